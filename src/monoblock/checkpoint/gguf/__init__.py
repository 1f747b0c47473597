"""GGUF files, llama.cpp's format: header, config, tensors under transformers' names."""
