"""Continuous batching over a paged KV cache. A request's tokens do not depend on the other requests."""
