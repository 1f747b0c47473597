"""Tests with four processes, and of the commands that start processes: `make test-distributed`."""

from __future__ import annotations

import os

ON = os.environ.get("MONOBLOCK_TEST_DISTRIBUTED") == "1"
collect_ignore_glob = [] if ON else ["test_*"]
