"""The tasks of fine-tuning, by name."""

from __future__ import annotations

import importlib

from monoblock.training.options import TrainingOptions
from monoblock.training.tasks.base import Task

_HOME = {
    "lm": ("monoblock.training.tasks.language", "LanguageTask"),
    "chat": ("monoblock.training.tasks.chat", "ConversationTask"),
    "token-classification": ("monoblock.training.tasks.tokens", "TokenClassificationTask"),
    "qa": ("monoblock.training.tasks.questions", "QuestionTask"),
    "fill-mask": ("monoblock.training.tasks.masking", "FillMaskTask"),
    "embedding": ("monoblock.training.tasks.pairs", "EmbeddingTask"),
    "preference": ("monoblock.training.tasks.preference", "PreferenceTask"),
    "classification": ("monoblock.training.tasks.classification", "ClassificationTask"),
}


def make_task(options: TrainingOptions) -> Task:
    """The task of the options."""
    module, name = _HOME[options.task]
    return getattr(importlib.import_module(module), name)(options)
