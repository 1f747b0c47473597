"""The generated stub matches the package."""

import importlib.util
from pathlib import Path

import monoblock
from monoblock import families

ROOT = Path(__file__).resolve().parents[2]


def _tool():
    spec = importlib.util.spec_from_file_location("make_stubs", ROOT / "tools" / "make_stubs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_stub_is_up_to_date():
    tool = _tool()
    assert tool.STUB.read_text(encoding="utf-8") == tool.stub(), "run python tools/make_stubs.py"


def test_every_public_name_resolves():
    for name in sorted(monoblock._NAMES):
        assert getattr(monoblock, name) is not None, name


def test_public_model_names_are_the_registry():
    assert set(monoblock._CLASSES) == {
        name for kind in families.FAMILIES for name in families.class_names(kind)
    }
    assert {len(names) for names in monoblock._MODELS.values()} == {len(monoblock._CLASSES)}
    for kind in families.FAMILIES:
        family = families.family(kind)
        assert tuple(row.name for row in family.classes) == families.class_names(kind)
        assert family.name == kind
