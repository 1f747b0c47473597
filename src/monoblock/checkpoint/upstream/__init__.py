"""The checkpoint formats of the original releases, each read, and most of them written, through a key map."""
