"""Which framework a pipeline runs on: the model's own, the one asked for, or the first that is installed."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from monoblock.installed import installed


@dataclass(frozen=True, kw_only=True)
class Framework:
    """A framework: its name in words, what its class names begin with, the packages that it needs, what installs
    them, and the backend that has its adapter."""

    name: str
    prefix: str
    needs: tuple[str, ...]
    extra: str
    backend: str

    @property
    def install(self) -> str:
        """The line that installs it."""
        return f'pip install "monoblock[{self.extra}]"'

    @property
    def adapter(self) -> Any:
        """The module with the class `Adapter`, which runs a model, and `load`, which makes one from files."""
        return importlib.import_module(f"monoblock.backends.{self.backend}.pipeline_adapter")

    def missing(self) -> str | None:
        """The first of its packages that is not installed; None if all are."""
        return next((package for package in self.needs if not installed(package)), None)


# In the order in which they are tried where nothing says which.
FRAMEWORKS: dict[str, Framework] = {
    "pt": Framework(name="PyTorch", prefix="", needs=("torch",), extra="torch", backend="pytorch"),
    "flax": Framework(name="JAX", prefix="Flax", needs=("jax", "flax"), extra="jax", backend="flax"),
    "tf": Framework(name="TensorFlow", prefix="TF", needs=("tensorflow", "keras"), extra="tf", backend="tf"),
}


def of_model(model: Any, asked: str | None = None) -> Framework:
    """The framework of a model object; TypeError if it is none of monoblock's, ValueError if another was asked for."""
    found = getattr(model, "framework", None)
    if found not in FRAMEWORKS or not hasattr(model, "row"):
        raise TypeError(
            f"model must be a name, a folder or one of monoblock's models, got {type(model).__name__}"
        )
    if asked is not None and known(asked) is not FRAMEWORKS[found]:
        raise ValueError(
            f"framework={asked!r}, but the model is a {type(model).__name__}, of framework={found!r}: leave framework "
            "out, or give the model's name or folder"
        )
    return FRAMEWORKS[found]


def chosen(asked: str | None, what: str = "a pipeline") -> Framework:
    """The framework of that name, or the first that is installed; ImportError with what to install, as `what` needs
    one."""
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
    """The framework of that name; ValueError if there is none."""
    if name not in FRAMEWORKS:
        names = ", ".join(f"{key!r} ({framework.name})" for key, framework in FRAMEWORKS.items())
        raise ValueError(f"framework={name!r}: expected one of {names}, or None")
    return FRAMEWORKS[name]
