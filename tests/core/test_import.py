"""What importing costs: nothing third-party for the package, a framework only for the names that need it."""

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


def added_by(statement: str) -> set[str]:
    """The top-level modules that a statement imports in a fresh interpreter."""
    result = python(
        f"import json, sys; before = set(sys.modules); {statement}; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    assert result.returncode == 0, result.stderr
    return {name.partition(".")[0] for name in json.loads(result.stdout)}


def test_the_package_imports_nothing_but_the_standard_library() -> None:
    assert added_by("import monoblock") - sys.stdlib_module_names == {"monoblock"}


def test_the_package_imports_at_once() -> None:
    # 50 ms is the promise, in the processor's time: other work on the machine is no fault of the import.
    code = "import time; start = time.process_time(); import monoblock; print(time.process_time() - start)"
    assert min(float(python(code).stdout) for _ in range(3)) < 0.05


@pytest.mark.parametrize("name", CORE)
def test_core_names_load_no_framework(name: str) -> None:
    assert added_by(f"from monoblock import {name}").isdisjoint(FRAMEWORKS)


def test_all_names_exist_and_are_listed() -> None:
    assert set(CORE) <= set(monoblock.__all__) <= set(dir(monoblock))
    with pytest.raises(AttributeError, match="MptForEverything"):
        _ = monoblock.MptForEverything


# Modules that are hidden, and how names must begin, or may not.
HIDDEN = {
    "no JAX": (("jax", "jaxlib"), ("MptForCausalLM", "DynamicCache"), "Flax"),
    "no Flax": (("flax", "tensorflow"), ("MptForCausalLM",), "Flax"),
    "no framework": (("torch", "flax", "jax", "tensorflow", "keras", "PIL", "transformers"), (), "Flax"),
    "no TensorFlow": (("tensorflow", "keras", "torch"), (), "TF"),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_a_star_takes_what_is_installed(case: str) -> None:
    """And none of what is not; no framework is imported to find out."""
    hidden, expected, without = HIDDEN[case]
    if expected and not installed("torch"):
        pytest.skip("torch is not installed")
    stars = case in ("no JAX", "no framework")
    if case == "no JAX":
        hidden = (*hidden, "tensorflow")  # it takes seconds to import
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
    for name in names:  # of classes that are chosen by a config, which need no framework before
        assert not name.startswith(without) or "Auto" in name or name.startswith("FLAX_"), name
    if "torch" in hidden:
        assert {"MptForCausalLM", "DynamicCache", "PreTrainedModel"}.isdisjoint(names)


def test_packages_are_attributes() -> None:
    """As `from monoblock import demo` gives them, without a framework."""
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
def test_a_missing_framework_is_named_with_its_pip_line(framework: str, name: str) -> None:
    # None in sys.modules makes Python treat a module as not installed
    result = python(f"import sys; sys.modules[{framework!r}] = None; from monoblock import {name}")
    error = result.stderr.splitlines()[-1]
    assert error.startswith("ImportError: ")
    needed = f"{name} needs (torch|jax|flax|tensorflow|keras), which is not installed: "
    assert re.search(needed + re.escape(f'pip install "monoblock[{EXTRA[framework]}]"'), error), error


@pytest.mark.parametrize(("framework", "prefix"), [("torch", ""), ("jax", "Flax"), ("tensorflow", "TF")])
def test_an_automatic_class_names_the_missing_framework_too(framework: str, prefix: str) -> None:
    chosen = f"monoblock.{prefix}AutoModelForCausalLM.from_config(monoblock.MptConfig())"
    result = python(f"import sys, monoblock; sys.modules[{framework!r}] = None; {chosen}")
    error = result.stderr.splitlines()[-1]
    assert f"monoblock.{prefix}MptForCausalLM needs " in error, error
    assert error.endswith(f'pip install "monoblock[{EXTRA[framework]}]"'), error


# A public name -> the frameworks that it may load.
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
    """Whether there is code of that name: tests/torch looks like a package without any, as pytest puts tests/ on the
    path."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


@pytest.mark.parametrize("name", OWN)
def test_a_name_loads_its_own_framework_alone(name: str) -> None:
    if missing := [module for module in OWN[name] if not installed(module)]:
        pytest.skip(f"{missing[0]} is not installed")
    assert added_by(f"from monoblock import {name}") & {*FRAMEWORKS, "transformers"} <= OWN[name]


@pytest.mark.skipif("MONOBLOCK_TEST_NO_FRAMEWORK" not in os.environ, reason="`make test-core` runs this")
def test_no_framework_is_installed_here() -> None:
    assert [name for name in FRAMEWORKS if installed(name)] == []
