"""Pipelines: from texts and images to answers in one call, by task."""

from monoblock.pipelines.base import KeyDataset, Pipeline
from monoblock.pipelines.factory import ALIASES, TASKS, pipeline

__all__ = ["ALIASES", "TASKS", "KeyDataset", "Pipeline", "pipeline"]
