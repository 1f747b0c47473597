"""Code that the JAX and TensorFlow backends share: the host side of `generate`, and array code that takes the
framework's functions as an argument (`namespace.py`). No framework is imported here."""
