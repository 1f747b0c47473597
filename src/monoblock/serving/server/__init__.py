"""The HTTP server: OpenAI's API over engines, embedding models and classifiers."""
