"""Many requests at once: the engine, `LLM`, batches and the HTTP server."""
