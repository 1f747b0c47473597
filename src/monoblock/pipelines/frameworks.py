"""The framework of a pipeline: that of the model object, the requested one, or the first that is installed."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from monoblock.installed import installed


@dataclass(frozen=True, kw_only=True)
class Framework:
    """A framework: its name, the prefix of its model classes, the packages that it needs, the extra that installs them,
    and the backend with its adapter."""

    name: str
    prefix: str
    needs: tuple[str, ...]
    extra: str
    backend: str
    learning: str  # the backend's module with the learners
    joining: str  # the backend's module with the processes of fine-tuning

    @property
    def install(self) -> str:
        """The pip command that installs it."""
        return f'pip install "monoblock[{self.extra}]"'

    @property
    def adapter(self) -> Any:
        """The backend's module with the class `Adapter`, which runs a model, and `load`, which loads one."""
        return importlib.import_module(f"monoblock.backends.{self.backend}.pipeline_adapter")

    @property
    def embedding_adapter(self) -> Any:
        """The backend's module with the class `EmbeddingAdapter`, which runs a model on texts without a head."""
        return importlib.import_module(f"monoblock.backends.{self.backend}.embedding_adapter")

    @property
    def engine_adapter(self) -> Any:
        """The backend's module that loads a model for an engine (`load`) and runs its steps (`runner`)."""
        return importlib.import_module(f"monoblock.backends.{self.backend}.engine_adapter")

    @property
    def sharded_engine(self) -> Any:
        """The backend's module that runs an engine's steps on a sharded model."""
        return importlib.import_module(f"monoblock.backends.{self.backend}.parallel.engine")

    @property
    def processes(self) -> Any:
        """The backend's module that starts the processes of a sharded model."""
        return importlib.import_module(f"monoblock.backends.{self.backend}.parallel.processes")

    @property
    def learners(self) -> Any:
        """The backend's classes that train and evaluate models, by the form of their loss."""
        return importlib.import_module(f"monoblock.backends.{self.backend}.{self.learning}").LEARNERS

    @property
    def training_processes(self) -> Any:
        """The backend's module that joins the processes of a launcher."""
        return importlib.import_module(f"monoblock.backends.{self.backend}.{self.joining}")

    def missing(self) -> str | None:
        """The first of its packages that is not installed; None if all are installed."""
        return next((package for package in self.needs if not installed(package)), None)


# In the order of preference.
FRAMEWORKS: dict[str, Framework] = {
    "pt": Framework(
        name="PyTorch",
        prefix="",
        needs=("torch",),
        extra="torch",
        backend="pytorch",
        learning="training.kinds",
        joining="training.processes",
    ),
    "flax": Framework(
        name="JAX",
        prefix="Flax",
        needs=("jax", "flax"),
        extra="jax",
        backend="flax",
        learning="learner",
        joining="learner_processes",
    ),
    "tf": Framework(
        name="TensorFlow",
        prefix="TF",
        needs=("tensorflow", "keras"),
        extra="tf",
        backend="tf",
        learning="learner",
        joining="learner_processes",
    ),
}


def of_model(model: Any, asked: str | None = None) -> Framework:
    """The framework of a model object; TypeError if it is not one of monoblock's, ValueError if `asked` differs."""
    found = getattr(model, "framework", None)
    if found not in FRAMEWORKS or not hasattr(model, "row"):
        raise TypeError(
            f"model must be a name, a folder or one of monoblock's models, got {type(model).__name__}"
        )
    if asked is not None and known(asked) is not FRAMEWORKS[found]:
        raise ValueError(
            f"framework={asked!r}, but the model is a {type(model).__name__}, of framework={found!r}: leave out "
            "framework, or pass the model's name or folder"
        )
    return FRAMEWORKS[found]


def chosen(asked: str | None, what: str = "a pipeline") -> Framework:
    """The framework of that name, or the first installed one; ImportError with the pip command, on behalf of `what`."""
    if asked is None:
        found = next((framework for framework in FRAMEWORKS.values() if framework.missing() is None), None)
        if found is None:
            lines = ", or ".join(framework.install for framework in FRAMEWORKS.values())
            raise ImportError(f"{what} needs PyTorch, JAX or TensorFlow, and none is installed: {lines}")
        return found
    framework = known(asked)
    if (package := framework.missing()) is not None:
        raise ImportError(f"framework={asked!r} needs {package}, which is not installed: {framework.install}")
    return framework


def known(name: Any) -> Framework:
    """The framework of that name; ValueError for an unknown one."""
    if name not in FRAMEWORKS:
        names = ", ".join(f"{key!r} ({framework.name})" for key, framework in FRAMEWORKS.items())
        raise ValueError(f"framework={name!r}: expected one of {names}, or None")
    return FRAMEWORKS[name]
