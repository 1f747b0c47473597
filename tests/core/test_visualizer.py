"""AttentionMaskVisualizer without weights or frameworks: masks, labels, terminal output, files, heat maps."""

from __future__ import annotations

import importlib.util
import io
import itertools
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import text_tokenizers
import visualizer_cases

from monoblock.families import FAMILIES
from monoblock.tokenization import PreTrainedTokenizerFast
from monoblock.utils import visibility
from monoblock.utils.attention_visualizer import AttentionMaskVisualizer, show
from monoblock.utils.drawing import Drawing
from monoblock.utils.heatmap import LEVELS, MASKED, Style, levels, lines, shade_colour
from monoblock.utils.labels import TokenLabels, clipped, clusters, readable, width
from monoblock.utils.tokens import ranges
from monoblock.utils.visibility import Batch

TEXT = visualizer_cases.TEXTS[0]


def picture(visualizer: AttentionMaskVisualizer, columns: int = 80, **style: bool) -> list[str]:
    """The lines of the first panel's text rendering."""
    return list(lines(visualizer.panels()[0], Style(columns, **style)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved config and tokenizer of a tiny Mistral, without weights."""
    visualizer_cases.config("mistral").save_pretrained(tmp_path)
    visualizer_cases.tokenizer("mistral").save_pretrained(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------------- masks


def test_the_documented_example_of_transformers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from monoblock.utils.attention_visualizer import AttentionMaskVisualizer

    visualizer = AttentionMaskVisualizer(str(folder))
    assert visualizer("Do you have mayonnaise recipes?") is None
    printed = capsys.readouterr().out
    assert printed.startswith("all 3 layers: causal, window of 4\n")
    assert "\x1b" not in printed
    for index, letter in enumerate("Do"):
        assert re.search(rf"^{letter} +{index} (█ ){{{index + 1}}}·", printed, re.MULTILINE)


def test_mask_of_a_window_with_left_padding() -> None:
    batch = Batch(np.array([[False, True, True, True, True]]))
    mask = visibility.visible(batch, causal=True, window=2)
    assert mask[0].astype(int).tolist() == [
        [0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize(("causal", "window"), list(itertools.product((True, False), (None, 1, 3, 9))))
def test_masks_equal_the_formula_for_each_pair(causal: bool, window: int | None) -> None:
    rng = np.random.default_rng(1)
    batch = Batch(rng.random((3, 7)) > 0.3, rng.integers(0, 2, (3, 7)))
    mask = visibility.visible(batch, causal=causal, window=window)
    for b, q, k in itertools.product(range(3), range(7), range(7)):
        expected = (
            bool(batch.valid_bk[b, k]) and (k <= q or not causal) and (window is None or q - k < window)
        )
        assert mask[b, q, k] == (expected and batch.segment_bk[b, q] == batch.segment_bk[b, k])


def test_each_kind_of_layer_has_a_panel() -> None:
    visualizer = visualizer_cases.visualizer("gpt_neo")
    visualizer.read(TEXT)
    titles = [panel.title for panel in visualizer.panels()]
    assert titles == ["layers 0, 2: causal", "layers 1, 3: causal, window of 3"]
    assert visualizer.mask(0)[0].sum() == 9 * 10 // 2
    assert visualizer.mask(3)[0].sum() == 1 + 2 + 7 * 3
    visualizer.read("fox")
    assert visualizer.panels()[1].title.endswith("window of 3, wider than the text")


def test_bidirectional_mask_and_position_buckets() -> None:
    visualizer = visualizer_cases.visualizer("mpnet")
    visualizer.read(visualizer_cases.TEXTS)
    mask = visualizer.mask()
    assert (mask == visualizer.tokens.batch.valid_bk[:, None, :]).all()
    buckets = visualizer.buckets()
    assert buckets[4].tolist()[2:7] == [
        2,
        1,
        0,
        7,
        8,
    ]  # 12 buckets: 0-5 for previous keys, 6-11 for later ones
    shade = visualizer.panels()[0].shade
    assert shade[0, 0] == 1
    assert (np.diff(shade[0, :9]) <= 0).all()  # decreases with the distance
    with pytest.raises(ValueError, match=r"learned: pass the model's table \(12, 6\)"):
        visualizer.bias()
    with pytest.raises(ValueError, match=r"must be \(buckets, heads\) = \(12, 6\), got \(3, 6\)"):
        visualizer.bias(table=np.zeros((3, 6)))
    table = np.arange(72).reshape(12, 6)
    assert visualizer.bias(table=table)[0, 5, 4, 5] == table[7, 5]


def test_alibi_bias_and_shades() -> None:
    visualizer = visualizer_cases.visualizer("mpt")
    visualizer.read(TEXT)
    slopes = visualizer.spec.positions[0].slopes(6)
    bias = visualizer.bias(1)
    assert bias.shape == (1, 6, 9, 9)
    assert bias[0, 3, 7, 2] == pytest.approx(-5 * slopes[3])
    assert (bias[0, :, 2, 7] == np.finfo(np.float32).min).all()
    shade = visualizer.panels()[0].shade
    # fp32 holds seven digits
    assert shade[7, 2] == pytest.approx(np.mean(np.exp(-5 * np.array(slopes))), rel=1e-6)
    assert np.isnan(shade[2, 7])
    visualizer(TEXT, head=3)
    assert visualizer.panels()[0].shade[7, 2] == pytest.approx(np.exp(-5 * slopes[3]), rel=1e-6)
    assert "head 3" in visualizer.panels()[0].legend


def test_padding_side() -> None:
    visualizer = visualizer_cases.visualizer("openai-gpt")
    for side, index in (("left", 0), ("right", -1)):
        visualizer.read(["def", TEXT], padding_side=side)
        assert visualizer.tokens.labels[0][index] == "<pad>"
        assert visualizer.tokens.batch.valid_bk.sum(axis=1).tolist() == [1, 9]
        assert visualizer.panels()[0].title == "text 0, all 2 layers: causal"
    visualizer.tokenizer.padding_side = "left"
    visualizer.read(["def", TEXT])
    assert visualizer.tokens.labels[0][0] == "<pad>"


# ---------------------------------------------------------------------------- images


def test_patches_of_images() -> None:
    visualizer = visualizer_cases.visualizer("fuyu")
    visualizer.read("what is", patches=(2, 3))
    labels = visualizer.tokens.labels[0]
    grid = ("<img>", "<img>", "<img>", "<row>")
    assert labels == (*grid, *grid, "<s>", "␣what", "␣is", "<0x04>")
    assert visualizer.tokens.image_bk[0].sum() == 6
    by_size = visualizer.tokens
    visualizer.read("what is", images=np.zeros((8, 12, 3), np.uint8))  # patches of 4 x 4 pixels
    assert visualizer.tokens.labels == by_size.labels
    visualizer.read(["what is", "cat"], images=[np.zeros((4, 4, 3), np.uint8), None])
    assert visualizer.tokens.labels[1][-3:] == ("<s>", "␣cat", "<0x04>")  # padded on the left
    visualizer.read("what is")
    assert visualizer.tokens.labels == (("␣what", "␣is"),)


def test_image_settings_are_read_from_the_files(tmp_path: Path) -> None:
    from monoblock.processing import FuyuImageProcessor

    visualizer_cases.config("fuyu").save_pretrained(tmp_path)
    visualizer_cases.tokenizer("fuyu").save_pretrained(tmp_path)
    size, patch = {"height": 8, "width": 8}, {"height": 4, "width": 4}
    FuyuImageProcessor(size=size, patch_size=patch).save_pretrained(tmp_path)
    visualizer = AttentionMaskVisualizer(tmp_path)
    visualizer.read("cat", patches=(2, 2))
    with pytest.raises(ValueError, match="more than the model's images have"):
        visualizer.read("cat", patches=(2, 3))


# ---------------------------------------------------------------------------- labels


def test_labels_of_invisible_and_wide_characters() -> None:
    assert readable(" a\n\tb\u00a0") == "␣a↵⇥b␣"
    assert readable("\x1b[31m\x7f\u200d") == "␛[31m\N{REPLACEMENT CHARACTER}"
    assert (
        readable("❤\ufe0f 👍\U0001f3fd 🇩🇪") == "❤␣👍␣DE"
    )  # without characters whose width depends on the terminal
    assert [width(x) for x in ("abc", "你好", "🎉", "e\u0301", "한", "ﾊ", "、")] == [3, 4, 2, 1, 2, 1, 2]
    assert clusters("e\u0301x") == ["e\u0301", "x"]
    assert clipped("你好吗", 6) == "你好吗"
    assert clipped("你好吗", 5) == "你好…"
    assert clipped("你好吗", 4) == "你…"
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_labels_of_byte_level_tokens() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=text_tokenizers.byte_level(" 你好", "\n  x", "é"))
    labels = TokenLabels(tokenizer)
    ids = tokenizer(" 你好\n  xé🎉<eos>")["input_ids"]
    assert [labels(i) for i in ids] == ["␣你好", "↵␣␣x", "é", "<F0>", "<9F>", "<8E>", "<89>", "<eos>"]
    assert labels(10**6) == "[1000000]"


def test_labels_of_other_tokens() -> None:
    fallback = PreTrainedTokenizerFast(tokenizer_object=text_tokenizers.byte_fallback("▁a", "▁"))
    labels = TokenLabels(fallback)
    found = [labels(fallback.convert_tokens_to_ids(t)) for t in ("▁a", "▁", "<0x0A>", "<0xE4>")]
    assert found == ["␣a", "␣", "↵", "<0xE4>"]
    words = PreTrainedTokenizerFast(tokenizer_object=text_tokenizers.word_piece("do", "##ing", "do</w>"))
    labels = TokenLabels(words)
    assert [labels(i) for i in (1, 2, 3)] == ["do", "##ing", "do␣"]


# ---------------------------------------------------------------------------- terminal


def columns_of(line: str) -> int:
    plain = re.sub(r"\x1b\[[\d;]*m", "", line)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in plain)
    return len(plain) + wide - sum(unicodedata.combining(c) > 0 for c in plain)


def test_wide_tokens_are_aligned() -> None:
    backend = text_tokenizers.byte_level("你好", "吗", "🎉", "e\u0301", "def")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    visualizer = AttentionMaskVisualizer.from_config(visualizer_cases.config("openai-gpt"), tokenizer)
    visualizer.read("你好def🎉吗e\u0301")
    drawn = picture(visualizer)
    rows = [line for line in drawn if re.search(r"\d [█·]", line)]
    starts = {columns_of(line[: re.search(r"[█·]", line).start()]) for line in rows}
    assert starts == {4 + len(" 0 ")}
    assert drawn[1:4] == ["         d", "       你e", "       好f 🎉吗e\u0301"]  # column labels are vertical


def test_colours_depend_on_term_and_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    visualizer = visualizer_cases.visualizer("mistral")
    visualizer.read(TEXT)

    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    def printed() -> str:
        show(visualizer.panels(), stream := Terminal())
        return stream.getvalue()

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[38;5;87m██" in printed()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in printed()
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in printed()


def test_coloured_and_plain_output_show_the_same_mask() -> None:
    visualizer = visualizer_cases.visualizer("fuyu")
    visualizer.read("what is", patches=(1, 2))
    plain, coloured = picture(visualizer), picture(visualizer, colour=True)
    bare = [re.sub(r"\x1b\[[\d;]*m", "", line).replace("██", "█ ").rstrip() for line in coloured]
    assert bare[1:-1] == plain[1:-1]
    assert "\x1b[38;5;220m██" in coloured[-1]  # the legend of image patches


def test_long_texts_are_shortened_to_the_width() -> None:
    visualizer = visualizer_cases.visualizer("mistral")
    visualizer.read("the quick brown fox " * 30)
    assert visualizer.tokens.length > 60
    for columns in (20, 61, 80, 200):
        drawn = picture(visualizer, columns)
        assert max(map(columns_of, drawn[1:-2])) <= columns
        first, last, total = map(
            int, re.search(r"first (\d+) and the last (\d+) of (\d+)", drawn[-1]).groups()
        )
        assert total == visualizer.tokens.length
        assert sum(bool(re.search(r"\d [█·]", line)) for line in drawn) == first + last
    assert visualizer.svg().count(">fox<") + visualizer.svg().count(">␣fox<") == 2 * 30


def test_ascii_streams() -> None:
    visualizer = visualizer_cases.visualizer("mpt")
    visualizer.read("def f(n): é\nx" + TEXT)
    stream = io.TextIOWrapper(buffer := io.BytesIO(), encoding="ascii")
    show(visualizer.panels(), stream)
    stream.flush()
    printed = buffer.getvalue().decode("ascii")
    assert "#" in printed
    assert "\\xe9" in printed or "<C3>" in printed
    assert "\\n" in printed


# ---------------------------------------------------------------------------- files


def area(svg: str, colours: set[str]) -> float:
    """The area filled with these colours, in square pixels."""
    paths = re.findall(r'<path fill="(#\w+)" d="([^"]*)"', svg)
    boxes = [box for colour, d in paths if colour in colours for box in re.findall(r"h([\d.]+)v([\d.]+)", d)]
    return sum(float(w) * float(h) for w, h in boxes)


def test_filled_cells_equal_the_mask() -> None:
    visualizer = visualizer_cases.visualizer("mistral")
    visualizer.read("x" * 400)  # cells of 4 x 4 pixels without gaps
    svg = visualizer.svg()
    assert area(svg, {shade_colour(LEVELS - 1)}) == visualizer.mask().sum() * 16
    assert area(svg, {MASKED}) == 400 * 400 * 16


def test_svg_and_html_files(tmp_path: Path) -> None:
    visualizer = visualizer_cases.visualizer("gpt_neo")
    visualizer.read(["a <b> & 'c'", TEXT])
    text = visualizer.svg(tmp_path / "mask.svg")
    assert (tmp_path / "mask.svg").read_text(encoding="utf-8") == text == visualizer.svg()
    root = ElementTree.fromstring(text)
    texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"text 1, layers 1, 3: causal, window of 3", "<", "&"} <= set(texts)
    assert texts.count("␣quick") == 2 * 2  # as row and column label, for both kinds of layers
    assert visualizer._repr_html_() == text
    page = visualizer.html(tmp_path / "mask.html")
    assert (tmp_path / "mask.html").read_text(encoding="utf-8") == page
    assert page.startswith("<!doctype html>")
    assert text in page
    assert not re.search(r"<script|https?://(?!www\.w3\.org)", page)  # no external resources


def test_png_files(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    visualizer = visualizer_cases.visualizer("mpt")
    visualizer.read(TEXT)
    assert visualizer.png(tmp_path / "mask.png") == (tmp_path / "mask.png").read_bytes()
    opened = image.open(tmp_path / "mask.png").convert("RGB")
    size = re.search(r'width="(\d+)" height="(\d+)"', visualizer.svg()).groups()
    assert opened.size == tuple(map(int, size))
    colours = {f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b) in opened.getcolors(100_000)}
    drawn = {int(code) for code in np.unique(levels(visualizer.panels()[0].shade, LEVELS)) if code >= 0}
    assert {MASKED, *map(shade_colour, drawn)} <= colours


def test_png_without_pillow_raises_an_import_error_with_the_pip_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=re.escape('pip install "monoblock[vision]"')):
        Drawing(10, 10, "nothing").png()


# ---------------------------------------------------------------------------- weights


def test_weights_become_heat_maps() -> None:
    visualizer = visualizer_cases.visualizer("mistral")
    visualizer.read(TEXT)
    rng = np.random.default_rng(0)
    attentions = [rng.random((1, 6, 9, 9), np.float32) * visualizer.mask(0)[:, None] for _ in range(3)]
    [panel] = visualizer.weights(attentions, layer=1, head=4)
    largest = attentions[1][0, 4].max()
    assert panel.title == "layer 1, head 4"
    assert panel.legend.endswith(f"{largest:.3g}")
    assert (np.isnan(panel.shade) == ~visualizer.mask(1)[0]).all()
    assert panel.shade[8, 6] == attentions[1][0, 4, 8, 6] / largest
    [mean] = visualizer.weights(attentions, layer=2)
    expected = attentions[2][0].mean(axis=0)
    assert mean.shade[8, 6] == pytest.approx(expected[8, 6] / expected.max(), rel=1e-6)
    assert len(visualizer.weights(attentions, head="all")) == 3 * 6
    for arguments, message in (
        ({"layer": 3}, "layer must be 0 to 2, got 3"),
        ({"head": 6}, "head must be 0 to 5, 'mean' or 'all', got 6"),
        ({"head": "most"}, "got 'most'"),
    ):
        with pytest.raises(ValueError, match=message):
            visualizer.weights(attentions, **arguments)
    with pytest.raises(ValueError, match="must hold 3 layers, got 2"):
        visualizer.weights(attentions[:2])
    with pytest.raises(ValueError, match=re.escape("layer 0 must be (1, 6, 9, 9), got (1, 6, 9, 8)")):
        visualizer.weights([a[..., :8] for a in attentions])


# ---------------------------------------------------------------------------- errors, imports


@pytest.mark.parametrize(
    ("family", "call", "message"),
    [
        ("mpt", {"text": ""}, "text 0 has no tokens"),
        ("mpt", {"text": []}, "there is no text"),
        ("mpt", {"text": "x", "padding_side": "top"}, "'left' or 'right', got 'top'"),
        ("mpt", {"text": "x", "patches": (1, 1)}, "mpt takes text alone"),
        ("mpt", {"text": "x", "sequence_id": [0]}, "sequence_id would have no effect"),
        ("mpt", {"text": "x", "head": 6}, "head must be 0 to 5"),
        ("mistral", {"text": "x", "head": 0}, "head would have no effect"),
        ("fuyu", {"text": "x", "patches": (0, 1)}, "each 1 or more"),
        ("fuyu", {"text": "x", "patches": (1, 1), "images": "a.png"}, "not both"),
        ("fuyu", {"text": ["x", "y"], "images": [None]}, "got 1 for 2 texts"),
        ("openai-gpt", {"text": "x" * 600}, "512 learned positions, but the text has 600 tokens"),
    ],
)
def test_invalid_calls_are_refused(family: str, call: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        visualizer_cases.visualizer(family)(**call)


def test_invalid_arguments_of_methods(folder: Path) -> None:
    with pytest.raises(TypeError, match="no argument 'layers'"):
        AttentionMaskVisualizer(folder, layers=3)
    visualizer = AttentionMaskVisualizer(folder, local_files_only=True)
    assert visualizer._repr_html_() is None
    with pytest.raises(ValueError, match="there is no text yet"):
        visualizer.mask()
    visualizer.read("fox")
    with pytest.raises(ValueError, match="layer must be 0 to 2, got 3"):
        visualizer.mask(3)
    with pytest.raises(ValueError, match="mistral has no relative position buckets"):
        visualizer.buckets()
    with pytest.raises(ValueError, match="table would have no effect"):
        visualizer.bias(table=np.zeros((1, 1)))
    packed = visualizer_cases.visualizer("mpt", attn_config={"attn_uses_sequence_id": True})
    with pytest.raises(ValueError, match=r"every token of every text, \[9\], got \[2\]"):
        packed.read(TEXT, sequence_id=[0, 1])
    with pytest.raises(OSError, match="nowhere"):
        AttentionMaskVisualizer(folder / "nowhere", local_files_only=True)


def test_neither_frameworks_nor_pillow_are_imported(folder: Path) -> None:
    code = (
        "import sys; from monoblock.utils.attention_visualizer import AttentionMaskVisualizer as A; "
        f"a = A({str(folder)!r}); a('fox'); a.svg(); "
        "print(sorted({'torch', 'jax', 'tensorflow', 'PIL', 'rich', 'typer'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"COLUMNS": "60"}
    )
    assert result.stdout.endswith("[]\n"), result.stderr


# ---------------------------------------------------------------------------- docs/attention.md


ROOT = Path(__file__).parents[2]


def test_the_pictures_of_the_document_are_up_to_date() -> None:
    file = ROOT / "tools" / "make_attention_pictures.py"
    spec = importlib.util.spec_from_file_location("make_attention_pictures", file)
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    text = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
    assert set(tool.PICTURES) == set(FAMILIES)
    for name in FAMILIES:
        stored = tool.path(name).read_text(encoding="utf-8")
        assert tool.picture(name) == stored, "run: python tools/make_attention_pictures.py"
        assert f"](attention/{name}.svg)" in text


def test_the_example_of_the_document(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
    example = text.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(folder)
    exec(example.replace("mistralai/Mistral-7B-v0.1", str(folder)), {})
    assert "text 1, all 3 layers: causal, window of 4" in capsys.readouterr().out
    assert (folder / "mask.svg").exists()
