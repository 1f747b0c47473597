"""The router of Ray Serve that keeps requests which begin alike on one replica (`affinity.py`)."""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import (  # pyright: ignore[reportMissingImports]
    PendingRequest,
    RequestRouter,
    RunningReplica,
)

from monoblock.cluster.affinity import preferred, request_key


class PrefixRouter(RequestRouter):
    """Calls `answer(head, body)` of the replica of the body's key; of the less busy of two where that one has over
    `bound` more requests than the least busy, or refuses, and for requests without a prompt."""

    def initialize_state(self, **kwargs: Any) -> None:
        self._bound = int(kwargs["bound"])

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        others = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        key = None if pending_request is None else request_key(pending_request.args[1])
        own = None
        if key is not None:
            own = preferred(key, candidate_replicas, _name, self._load, self._bound)
        return [others] if own is None else [[own], others]

    def _load(self, replica: RunningReplica) -> int:
        """Requests that the replica had when it was last asked; 0 if that is too long ago."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def _name(replica: RunningReplica) -> str:
    return str(replica.replica_id.unique_id)
