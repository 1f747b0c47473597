"""One module for each backend; `worker.py` runs the class `Backend` of one of them in a process of its own.

A `Backend` needs nothing but what its backend needs, so that it runs in another Python than the runner's:
`start()` imports, `versions()` names them, `load(folder, form)` loads, `generate(prompts, new)` gives the new tokens of
equally long prompts, greedily. Some can do more: `logits`, `train`.
"""
