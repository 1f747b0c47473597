"""`python -m monoblock.cli`: the same as the command `monoblock`."""

from monoblock.cli import main

if __name__ == "__main__":
    main()
