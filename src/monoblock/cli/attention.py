"""`monoblock attention`: show a model's attention mask, or attention weights as heat maps."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from monoblock.cli import console
from monoblock.cli.app import EXIT_CODES, sub_app
from monoblock.cli.options import DownloadOptions, Dtype, ModelOptions

if TYPE_CHECKING:
    from monoblock.utils.attention_visualizer import AttentionMaskVisualizer
    from monoblock.utils.heatmap import Panel

app = sub_app()


@dataclass(frozen=True, kw_only=True)
class Files:
    """Output files, instead of the terminal."""

    svg: Annotated[Path | None, typer.Option(help="Write an SVG file.")] = None
    png: Annotated[Path | None, typer.Option(help="Write a PNG file (needs Pillow).")] = None
    html: Annotated[Path | None, typer.Option(help="Write an HTML page.")] = None

    def given(self) -> dict[str, Path]:
        """File type -> path, for the options that are given."""
        files = {"svg": self.svg, "png": self.png, "html": self.html}
        return {kind: path for kind, path in files.items() if path is not None}


@app.command(epilog=EXIT_CODES)
@console.command
def attention(
    *,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] TEXT",
            help="A model as in --model, and the text; - reads it from stdin.",
        ),
    ],
    source: ModelOptions,
    hub: DownloadOptions,
    layer: Annotated[
        int | None, typer.Option(min=0, help="Show the weights of this layer; default: all.")
    ] = None,
    head: Annotated[
        str | None, typer.Option(metavar="N|mean|all", help="Show the weights of this head; default: mean.")
    ] = None,
    files: Files,
) -> None:
    """Show the attention mask of a text; with --layer or --head, the attention weights.

    The mask needs only config and tokenizer; the weights need a run of the model. The default model is the embedded
    demo.
    """
    name, text = _model_and_text(words, source.model)
    with_weights = layer is not None or head is not None
    if not with_weights and (source.dtype is not Dtype.AUTO or source.device != "auto" or source.quantize):
        raise typer.BadParameter(
            "--dtype, --device and --quantize need --layer or --head: without them, no weights are loaded"
        )
    wanted = _head(head or "mean")
    from monoblock.cli.engine import locate, need_pytorch

    if with_weights:
        need_pytorch("monoblock attention --layer or --head")
    from monoblock.utils import attention_visualizer as pictures

    path, _ = locate(name)
    where = hub.kwargs() if name else {}
    visualizer = pictures.AttentionMaskVisualizer(path, **where)
    visualizer.read(text)
    title = visualizer.title
    if with_weights:
        _check(visualizer, layer, wanted)
        panels = _weights(visualizer, text, (path, where, source), (layer, wanted))
        title = title.replace("attention mask", "attention weights")
    else:
        panels = visualizer.panels()
    if not files.given():
        pictures.show(panels)
    for kind, file in files.given().items():
        pictures.save(panels, title, file, kind)
        console.note(f"wrote {file}")


def _model_and_text(words: list[str], model: str | None) -> tuple[str | None, str]:
    """Split the arguments into model and text; usage error for anything else."""
    if len(words) > 2 or (len(words) == 2 and model is not None):
        raise typer.BadParameter("give one model and one quoted text: monoblock attention MODEL 'a text'")
    text = sys.stdin.read().removesuffix("\n") if words[-1] == "-" else words[-1]
    if not text:
        raise typer.BadParameter("the text is empty")
    return (words[0] if len(words) == 2 else model), text


def _head(given: str) -> int | str:
    if given in ("mean", "all"):
        return given
    if not given.isdecimal():
        raise typer.BadParameter(f"--head must be a number, mean or all, got {given!r}")
    return int(given)


def _check(visualizer: AttentionMaskVisualizer, layer: int | None, head: int | str) -> None:
    """Usage error, before weights are loaded, for a layer or head that the model does not have."""
    from monoblock.utils.panels import check_head, check_layer

    try:
        if layer is not None:
            check_layer(visualizer.spec, layer)
        if isinstance(head, int):
            check_head(visualizer.spec, head)
    except ValueError as error:
        raise typer.BadParameter(f"the {error}") from None


def _weights(
    visualizer: AttentionMaskVisualizer,
    text: str,
    files: tuple[str, dict[str, Any], ModelOptions],
    chosen: tuple[int | None, int | str],
) -> list[Panel]:
    """Panels of attention weights, from a run of the model on the text."""
    import torch

    model = _load(visualizer, *files)
    ids = visualizer.tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    with torch.inference_mode():
        found = model(input_ids=ids, output_attentions=True).attentions
    layer, head = chosen
    arrays = [weights.float().cpu().numpy() for weights in found]
    return visualizer.weights(arrays, layer=layer, head=head)


def _load(visualizer: AttentionMaskVisualizer, path: str, where: dict[str, Any], source: ModelOptions) -> Any:
    """The model in the class that its config names, so that all of its weights are used."""
    import monoblock
    from monoblock.cli.engine import device_map
    from monoblock.families import FAMILIES, class_names, named_classes

    config = visualizer.config
    known, named = class_names(config.model_type), named_classes(config)
    bare = FAMILIES[config.model_type][0] + "Model"
    chosen = named[0].name if named else bare if bare in known else known[0]
    if device := device_map(source.device):
        where = where | {"device_map": device}
    return getattr(monoblock, chosen).from_pretrained(path, **source.kwargs(), **where).eval()
