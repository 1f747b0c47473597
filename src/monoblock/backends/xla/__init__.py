"""What the JAX and the TensorFlow backends share: host code, and code over a framework's arrays that is handed the
framework's functions (`namespace.py`). No framework is imported here."""
