"""Imports: the package imports no third-party module, and public names import only their own framework."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

import monoblock
from monoblock import demo

FRAMEWORKS = ("torch", "jax", "flax", "tensorflow", "keras")

# The public names that need no framework.
CORE = (
    "AutoConfig",
    "AutoTokenizer",
    "BatchEncoding",
    "CheckpointError",
    "GenerationConfig",
    "GPTNeoXTokenizerFast",
    "HubError",
    "ModelOutput",
    "MptConfig",
    "PretrainedConfig",
    "PreTrainedTokenizerFast",
    "TextIteratorStreamer",
    "TextStreamer",
    "UnsupportedConfig",
)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def imported_by(statement: str) -> set[str]:
    """The top-level modules that a statement imports in a new interpreter."""
    result = python(
        f"import json, sys; before = set(sys.modules); {statement}; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    assert result.returncode == 0, result.stderr
    return {name.partition(".")[0] for name in json.loads(result.stdout)}


def test_the_package_imports_the_standard_library_only() -> None:
    assert imported_by("import monoblock") - sys.stdlib_module_names == {"monoblock"}


def test_the_package_imports_in_50_ms() -> None:
    # Processor time, which does not depend on other work on the machine.
    code = "import time; start = time.process_time(); import monoblock; print(time.process_time() - start)"
    assert min(float(python(code).stdout) for _ in range(3)) < 0.05


@pytest.mark.parametrize("name", CORE)
def test_core_names_import_no_framework(name: str) -> None:
    assert imported_by(f"from monoblock import {name}").isdisjoint(FRAMEWORKS)


def test_all_names_exist_and_are_listed() -> None:
    assert set(CORE) <= set(monoblock.__all__) <= set(dir(monoblock))
    with pytest.raises(AttributeError, match="MptForEverything"):
        _ = monoblock.MptForEverything


# case -> modules that are hidden, names that are expected, prefix of names that are absent.
HIDDEN = {
    "no JAX": (("jax", "jaxlib"), ("MptForCausalLM", "DynamicCache"), "Flax"),
    "no Flax": (("flax", "tensorflow"), ("MptForCausalLM",), "Flax"),
    "no framework": (("torch", "flax", "jax", "tensorflow", "keras", "PIL", "transformers"), (), "Flax"),
    "no TensorFlow": (("tensorflow", "keras", "torch"), (), "TF"),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_all_lists_names_of_installed_frameworks_only(case: str) -> None:
    """Without importing a framework."""
    hidden, expected, without = HIDDEN[case]
    if expected and not installed("torch"):
        pytest.skip("torch is not installed")
    stars = case in ("no JAX", "no framework")
    if case == "no JAX":
        hidden = (*hidden, "tensorflow")  # slow to import
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden!r}))\n"
        "import monoblock\n"
        "names = monoblock.__all__\n"
        "loaded = {name for name, module in sys.modules.items() if module}\n"
        "assert loaded.isdisjoint({'torch', 'jax', 'tensorflow', 'numpy'})\n"
        + ("from monoblock import *\nassert all(name in globals() for name in names)\n" if stars else "")
        + "print(*names)"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    names = result.stdout.split()
    assert {*expected, *CORE} <= set(names) <= set(dir(monoblock))
    for name in names:  # auto classes import their framework when a config selects it
        assert not name.startswith(without) or "Auto" in name or name.startswith("FLAX_"), name
    if "torch" in hidden:
        assert {"MptForCausalLM", "DynamicCache", "PreTrainedModel"}.isdisjoint(names)


def test_packages_are_attributes_without_a_framework() -> None:
    code = "import monoblock, sys; print(monoblock.demo.path(), *{'torch', 'jax', 'tensorflow'} & set(sys.modules))"
    assert python(code).stdout.strip() == str(demo.path())
    for name in ("demo", "pipelines", "utils"):
        assert getattr(monoblock, name).__name__ == f"monoblock.{name}"
        assert name in dir(monoblock)


MISSING = {
    "torch": ("MptForCausalLM", "MptModel", "DynamicCache", "PreTrainedModel"),
    "jax": ("FlaxMptForCausalLM", "FlaxPreTrainedModel", "FlaxMaskedLMOutput"),
    "tensorflow": ("TFMPNetModel", "TFPreTrainedModel"),
}
EXTRA = {"torch": "torch", "jax": "jax", "tensorflow": "tf"}


@pytest.mark.parametrize(
    ("framework", "name"), [(framework, name) for framework, names in MISSING.items() for name in names]
)
def test_import_errors_name_the_missing_framework_and_the_pip_command(framework: str, name: str) -> None:
    # None in sys.modules makes Python treat a module as not installed
    result = python(f"import sys; sys.modules[{framework!r}] = None; from monoblock import {name}")
    error = result.stderr.splitlines()[-1]
    assert error.startswith("ImportError: ")
    needed = f"{name} needs (torch|jax|flax|tensorflow|keras), which is not installed: "
    assert re.search(needed + re.escape(f'pip install "monoblock[{EXTRA[framework]}]"'), error), error


@pytest.mark.parametrize(("framework", "prefix"), [("torch", ""), ("jax", "Flax"), ("tensorflow", "TF")])
def test_auto_classes_name_the_missing_framework(framework: str, prefix: str) -> None:
    chosen = f"monoblock.{prefix}AutoModelForCausalLM.from_config(monoblock.MptConfig())"
    result = python(f"import sys, monoblock; sys.modules[{framework!r}] = None; {chosen}")
    error = result.stderr.splitlines()[-1]
    assert f"monoblock.{prefix}MptForCausalLM needs " in error, error
    assert error.endswith(f'pip install "monoblock[{EXTRA[framework]}]"'), error


# A public name -> the frameworks that it may import.
OWN = {
    "GPTNeoForCausalLM": {"torch"},
    "FlaxGPTNeoForCausalLM": {"jax", "flax"},
    "FlaxAutoModel": set(),
    "FlaxCausalLMOutputWithCrossAttentions": {"jax", "flax"},
    "TFMPNetForMaskedLM": {"tensorflow", "keras"},
    "TFBaseModelOutput": {"tensorflow", "keras"},
    "TFAutoModel": set(),
}


def installed(module: str) -> bool:
    """Whether a module is installed; tests/torch on pytest's path is a namespace package, which has no origin."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


@pytest.mark.parametrize("name", OWN)
def test_names_import_their_own_framework_only(name: str) -> None:
    if missing := [module for module in OWN[name] if not installed(module)]:
        pytest.skip(f"{missing[0]} is not installed")
    assert imported_by(f"from monoblock import {name}") & {*FRAMEWORKS, "transformers"} <= OWN[name]


@pytest.mark.skipif("MONOBLOCK_TEST_NO_FRAMEWORK" not in os.environ, reason="`make test-core` runs this")
def test_no_framework_is_installed_here() -> None:
    assert [name for name in FRAMEWORKS if installed(name)] == []
