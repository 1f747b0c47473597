"""monoblock: one transformer block, six model families, three frameworks."""
