"""The options `--ray [ADDRESS]` and `--replicas N`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer
import typer.core


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """Where actors run, and how many."""

    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="[ADDRESS]",
            help="Use actors of Ray on this machine, or in the cluster at HOST:PORT; auto: this machine's cluster.",
        ),
    ] = None
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Actors of --ray, each with the models; default: one per GPU, or per machine without GPUs.",
        ),
    ] = None

    def check(self, device: str) -> None:
        """Usage error for options that do not go together, before anything is imported or read."""
        from monoblock.cluster.actors import check_address, check_device

        if self.ray is None:
            if self.replicas is not None:
                raise typer.BadParameter("--replicas is the number of Ray's actors: add --ray")
            return
        try:
            check_address(self.ray)
            check_device(device)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None


class RayCommand(typer.core.TyperCommand):
    """A command whose option --ray may be without a value: an address follows, or the value is "local"."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments, with `--ray` as `--ray local` if no address follows."""
        from monoblock.cluster.actors import ADDRESS, LOCAL

        end = args.index("--") if "--" in args else len(args)
        found: list[str] = []
        for index, word in enumerate(args):
            found.append(word)
            if word == "--ray" and index < end:
                after = args[index + 1] if index + 1 < end else ""
                if not (ADDRESS.fullmatch(after) or "://" in after):
                    found.append(LOCAL)
        return super().parse_args(ctx, found)
