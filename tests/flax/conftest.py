"""Settings of every test of the JAX backend."""

import jax

# Tiny models take longer to compile than to run; what XLA's optimisers do is not what is tested here.
jax.config.update("jax_disable_most_optimizations", True)
