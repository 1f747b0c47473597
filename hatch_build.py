"""Build hook: compiles the native kernels for wheels and editable installs if there is a compiler."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILD = Path("src") / "monoblock" / "native" / "build.py"


class NativeKernels(BuildHookInterface):
    """Adds the libraries of `monoblock.native.build` to the wheel, and the platform to its tag."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles the kernels; errors do not stop the install."""
        try:
            builder = _builder(Path(self.root) / BUILD)
            outcome = builder.ready() or builder.build()
        except Exception as error:
            self.app.display_warning(f"monoblock is installed without its native kernels: {error}")
            return
        (self.app.display_info if outcome.levels else self.app.display_warning)(outcome.line)
        if outcome.levels and version != "editable":
            where = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{where}"
            build_data["artifacts"].append("src/monoblock/native/kernels_*.so")


def _builder(path: Path) -> Any:
    """Imports the module of a file without its package."""
    spec = importlib.util.spec_from_file_location("monoblock_native_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module
