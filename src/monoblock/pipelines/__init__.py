"""Pipelines: a model with its pre- and postprocessing, by task."""

from monoblock.pipelines.base import KeyDataset, Pipeline
from monoblock.pipelines.factory import ALIASES, TASKS, pipeline

__all__ = ["ALIASES", "TASKS", "KeyDataset", "Pipeline", "pipeline"]
