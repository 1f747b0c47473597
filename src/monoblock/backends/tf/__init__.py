from monoblock.backends.tf import framework as framework
