"""The learner of each form of loss."""

from monoblock.backends.pytorch.training.embedding import EmbeddingLearner
from monoblock.backends.pytorch.training.learner import Learner
from monoblock.backends.pytorch.training.preference import PreferenceLearner

LEARNERS: dict[str, type[Learner]] = {
    "labels": Learner,
    "pairs": EmbeddingLearner,
    "preferences": PreferenceLearner,
}
