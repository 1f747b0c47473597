"""One server for all tests that need no other settings; its models load when a test first asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from live_server import LiveServer

NAMES = ("demo", "tools", "vectors", "labels", "rank", "images")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A running server with a model of each kind."""
    import server_models
    from live_server import live

    folder = tmp_path_factory.mktemp("served")
    sources = [
        None,
        server_models.tools_model(folder / "tools"),
        server_models.vector_model(folder),
        server_models.score_model(folder / "labels", 3),
        server_models.score_model(folder / "rank", 1),
        server_models.image_model(folder / "images"),
    ]
    with live(*sources, names=NAMES) as running:
        yield running
