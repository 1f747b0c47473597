"""What the hub's libraries keep under this name: `monoblock.utils.attention_visualizer`."""
