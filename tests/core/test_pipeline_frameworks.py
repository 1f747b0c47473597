"""The framework of a pipeline: default, argument, model, and errors for missing packages."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
from types import SimpleNamespace
from typing import Any

import pytest

from monoblock.pipelines import frameworks, pipeline

PACKAGES = ("torch", "jax", "flax", "tensorflow", "keras")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that sets the packages that seem to be installed."""

    def choose(*names: str) -> None:
        def found(name: str) -> Any:
            if name not in names:
                return None
            return importlib.machinery.ModuleSpec(name, None, origin=f"{name}/__init__.py")

        monkeypatch.setattr(importlib.util, "find_spec", found)

    return choose


def test_the_default_is_the_first_installed_framework(installed: Any) -> None:
    for names, name in (
        (PACKAGES, "PyTorch"),
        (("jax", "flax", "tensorflow", "keras"), "JAX"),
        (("jax", "tensorflow", "keras"), "TensorFlow"),
    ):
        installed(*names)
        assert frameworks.chosen(None).name == name


def test_import_errors_name_the_missing_package_and_the_pip_command(installed: Any) -> None:
    installed("jax")
    for asked, package, extra in (
        ("pt", "torch", "torch"),
        ("flax", "flax", "jax"),
        ("tf", "tensorflow", "tf"),
    ):
        message = (
            f'framework={asked!r} needs {package}, which is not installed: pip install "monoblock[{extra}]"'
        )
        with pytest.raises(ImportError, match=re.escape(message)):
            pipeline("text-generation", framework=asked)
    with pytest.raises(
        ImportError, match=r"PyTorch, JAX or TensorFlow, and none is installed: .*\[torch\].*\[tf\]"
    ):
        pipeline("text-generation")


def test_a_namespace_package_is_not_the_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = importlib.machinery.ModuleSpec("torch", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: folder)
    assert frameworks.FRAMEWORKS["pt"].missing() == "torch"


def test_invalid_frameworks_and_models() -> None:
    with pytest.raises(
        ValueError, match=re.escape("framework='torch': expected one of 'pt' (PyTorch), 'flax' (JAX)")
    ):
        pipeline("text-generation", framework="torch")
    model = SimpleNamespace(framework="flax", row=None)
    assert frameworks.of_model(model).name == frameworks.of_model(model, "flax").name == "JAX"
    with pytest.raises(ValueError, match="of framework='flax': leave out framework"):
        frameworks.of_model(model, "tf")
    with pytest.raises(TypeError, match="one of monoblock's models, got SimpleNamespace"):
        frameworks.of_model(SimpleNamespace(framework="flax"))
