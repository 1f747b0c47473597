"""The build hook: compiles the native kernels for a wheel or an editable install; without a compiler there are none."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILD = Path("src") / "monoblock" / "native" / "build.py"


class NativeKernels(BuildHookInterface):
    """Adds what `monoblock.native.build` compiles to the wheel, which is then one for this kind of machine."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; whatever goes wrong must not stop the install."""
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
    """The module of that file, without importing the package around it."""
    spec = importlib.util.spec_from_file_location("monoblock_native_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks itself up
    spec.loader.exec_module(module)
    return module
