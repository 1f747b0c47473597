"""Tests with four processes, and of the commands that start processes: `make test-distributed`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ON = os.environ.get("MONOBLOCK_TEST_DISTRIBUTED") == "1"
collect_ignore_glob = [] if ON else ["test_*"]
# The models and the commands of the tests of serving.
sys.path.append(str(Path(__file__).parents[1] / "serving"))
