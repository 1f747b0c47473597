"""`monoblock serve --ray`: the server's replicas on Ray Serve, until a signal."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from monoblock.cli import console

if TYPE_CHECKING:
    from monoblock.serving.server.settings import ServerSettings

FREE_SHARE = 4  # as of an engine by default: the cache takes a quarter of the memory


def run(
    address: str,
    replicas: int | None,
    most: int | None,
    sources: tuple[list[str | None], list[str], list[str]],
    settings: ServerSettings,
    listening: Callable[[str], None],
) -> bool:
    """Serve until a signal; whether it was Ctrl-C. `most`: replicas that Ray Serve may have under load; None: as many
    as `replicas`. ValueError: a number that the machines do not allow; RuntimeError: the replicas do not start."""
    from monoblock.cluster.actors import connected

    stopped, interrupted, output = threading.Event(), False, sys.stdout

    def stop(number: int, frame: object) -> None:
        nonlocal interrupted
        del frame
        interrupted = interrupted or number == signal.SIGINT
        if stopped.is_set():  # the second signal
            os._exit(console.INTERRUPTED if interrupted else 0)
        stopped.set()

    with connected(address, most or replicas) as cluster:
        from ray import serve  # pyright: ignore[reportMissingImports]

        from monoblock.cluster.serve import APP, ReplicaOptions, application

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            plan = cluster.plan(most or replicas, settings.loading["device"])
            if settings.engine.cache_memory is None and plan.memory and not plan.gpu:
                engine = replace(settings.engine, cache_memory=plan.memory // FREE_SHARE)
                settings = replace(settings, engine=engine)
            options = ReplicaOptions(
                count=plan.replicas if most is None else replicas or 1,
                most=most,
                threads=plan.threads,
                cpus=plan.cpus,
                gpus=int(plan.gpu),
            )
            console.note(f"replicas of Ray Serve: {plan.summary().partition(': ')[2]}")
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
            quiet = {"log_level": "ERROR", "enable_access_log": False}
            port = settings.port or _free_port(settings.host)
            serve.start(
                http_options={"host": settings.host, "port": port, "request_timeout_s": None},
                logging_config=quiet,
            )
            app = application(settings, sources, options)
            try:
                serve.run(app, name=APP, route_prefix="/", logging_config=quiet)
                with contextlib.redirect_stdout(output):  # which `connected` has redirected
                    listening(f"http://{settings.host}:{port}")
                stopped.wait()
            finally:
                if cluster.local:
                    serve.shutdown()
                else:  # the cluster may serve other applications
                    serve.delete(APP)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return interrupted


def _free_port(host: str) -> int:
    import socket

    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
