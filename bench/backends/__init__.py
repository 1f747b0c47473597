"""One module for each backend, with a class `Backend` that `worker.py` runs in its own process.

A `Backend` imports only its library, so that it can run in another Python: `start()` imports it, `versions()` returns
versions, `load(folder, form)` loads a model, `generate(prompts, new)` returns the new greedy tokens of prompts of equal
length. Optional methods: `step_logits`, `logits`, `train`.
"""
