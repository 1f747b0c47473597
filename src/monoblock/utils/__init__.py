"""Public utilities under transformers' module names: `monoblock.utils.attention_visualizer`."""
