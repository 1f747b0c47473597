"""Tensor parallelism over processes of torch.distributed: each holds the shards that `partition.py` plans."""
