"""`python -m monoblock`: the same as the command `monoblock`; what torchrun and accelerate start."""

from monoblock.cli import main

if __name__ == "__main__":
    main()
