"""Which framework a pipeline takes, and what it says where there is none."""

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
    """Says which packages are found from now on."""

    def choose(*names: str) -> None:
        def found(name: str) -> Any:
            if name not in names:
                return None
            return importlib.machinery.ModuleSpec(name, None, origin=f"{name}/__init__.py")

        monkeypatch.setattr(importlib.util, "find_spec", found)

    return choose


def test_the_first_that_is_installed_is_taken(installed: Any) -> None:
    for names, name in (
        (PACKAGES, "PyTorch"),
        (("jax", "flax", "tensorflow", "keras"), "JAX"),
        (("jax", "tensorflow", "keras"), "TensorFlow"),
    ):
        installed(*names)
        assert frameworks.chosen(None).name == name


def test_what_is_missing_is_named_with_its_pip_line(installed: Any) -> None:
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


def test_a_folder_of_that_name_is_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = importlib.machinery.ModuleSpec("torch", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: folder)
    assert frameworks.FRAMEWORKS["pt"].missing() == "torch"


def test_names_and_objects() -> None:
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
