"""MkDocs hooks of the documentation site (mkdocs.yml): pages that are not in docs/, and links between all pages.

The API reference is generated from the table of public names, one page per group; README.md and the other documents of
the root, and the programs in examples/, become pages too. Imports no framework.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import monoblock

ROOT = Path(__file__).resolve().parents[1]

# Documents of the root -> pages of the site.
DOCUMENTS = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security-policy.md",
    "LICENSE": "license.md",
}
# Page of the API reference -> its title and the modules (or packages) that define its names.
API = {
    "auto": ("Auto classes", ["monoblock.auto"]),
    "pytorch": (
        "PyTorch models",
        ["monoblock.backends.pytorch.classes", "monoblock.backends.pytorch.pretrained"],
    ),
    "flax": (
        "JAX models",
        [
            "monoblock.backends.flax.classes",
            "monoblock.backends.flax.pretrained",
            "monoblock.backends.flax.processors",
            "monoblock.backends.flax.outputs",
        ],
    ),
    "tensorflow": (
        "TensorFlow models",
        [
            "monoblock.backends.tf.classes",
            "monoblock.backends.tf.pretrained",
            "monoblock.backends.tf.processors",
            "monoblock.backends.tf.callbacks",
            "monoblock.backends.tf.outputs",
        ],
    ),
    "configs": ("Configs", ["monoblock.config", "monoblock.families", "monoblock.quantization"]),
    "tokenizers": ("Tokenizers", ["monoblock.tokenization"]),
    "processing": ("Images", ["monoblock.processing"]),
    "generation": (
        "Generation",
        [
            "monoblock.generation",
            "monoblock.backends.pytorch.cache",
            "monoblock.backends.pytorch.generation",
            "monoblock.seeds",
        ],
    ),
    "pipelines": ("Pipelines", ["monoblock.pipelines"]),
    "embeddings": ("Sentence embeddings", ["monoblock.embeddings"]),
    "serving": ("Serving", ["monoblock.serving"]),
    "outputs": ("Outputs", ["monoblock.outputs"]),
    "errors": ("Errors", ["monoblock.errors"]),
}
OUTPUTS = (
    "BaseModelOutput",
    "BaseModelOutputWithPast",
    "BaseModelOutputWithPooling",
    "CausalLMOutputWithPast",
    "MaskedLMOutput",
    "SequenceClassifierOutput",
    "SequenceClassifierOutputWithPast",
    "TokenClassifierOutput",
    "QuestionAnsweringModelOutput",
    "MultipleChoiceModelOutput",
    "OpenAIGPTDoubleHeadsModelOutput",
)
EMBEDDING_FUNCTIONS = (
    "semantic_search",
    "paraphrase_mining",
    "paraphrase_mining_embeddings",
    "community_detection",
    "cos_sim",
    "dot_score",
    "euclidean_sim",
    "manhattan_sim",
    "pairwise_cos_sim",
    "pairwise_dot_score",
    "pairwise_euclidean_sim",
    "pairwise_manhattan_sim",
    "normalize_embeddings",
    "truncate_embeddings",
    "quantize_embeddings",
)
# The classes that the others of a page derive from, which come first.
FIRST = {
    "PreTrainedModel",
    "FlaxPreTrainedModel",
    "TFPreTrainedModel",
    "PretrainedConfig",
    "PreTrainedTokenizerFast",
}
# Objects outside of the package's top level that the documents describe.
FURTHER = {
    "pipelines": ["monoblock.pipelines.KeyDataset"],
    "embeddings": [
        *(
            f"monoblock.embeddings.{path}"
            for path in (
                "transformer.Transformer",
                "modules.Pooling",
                "modules.Dense",
                "modules.LayerNorm",
                "modules.Normalize",
            )
        ),
        *(f"monoblock.util.{name}" for name in EMBEDDING_FUNCTIONS),
    ],
    "serving": [
        f"monoblock.serving.outputs.{name}"
        for name in (
            "RequestOutput",
            "CompletionOutput",
            "Logprob",
            "EmbeddingRequestOutput",
            "EmbeddingOutput",
            "ClassificationRequestOutput",
            "ClassificationOutput",
            "ScoringRequestOutput",
            "ScoringOutput",
        )
    ],
    "outputs": [f"monoblock.outputs.{name}" for name in OUTPUTS],
    "tools": [
        "monoblock.demo.path",
        "monoblock.demo_chat.merged",
        "monoblock.demo_embeddings.path",
        "monoblock.demo_embeddings.index",
        "monoblock.utils.attention_visualizer.AttentionMaskVisualizer",
        "monoblock.conversion.convert.convert",
        "monoblock.conversion.convert.Options",
    ],
}
CALLS = ("forward", "call", "__call__")


def names_of(page: str) -> list[str]:
    """The public names that a page of the API reference describes: the base of all, others, the bases of families."""
    homes = {**monoblock._HOME, **monoblock._MADE}
    _, modules = API[page]
    own = [name for name, home in homes.items() if any(f"{home}.".startswith(f"{m}.") for m in modules)]
    bases = {name for names in monoblock._BASES_OF.values() for name in names}
    return sorted(own, key=lambda name: (name not in FIRST, name in bases, name not in monoblock._MADE, name))


def api_pages() -> dict[str, str]:
    """The pages of the API reference: path -> Markdown with mkdocstrings' directives."""
    pages = {"api/index.md": _index()}
    for page, (title, _) in API.items():
        names = [*(f"monoblock.{name}" for name in names_of(page)), *FURTHER.get(page, [])]
        pages[f"api/{page}.md"] = f"# {title}\n\n" + "\n".join(map(_directive, names))
    pages["api/tools.md"] = "# Tools\n\n" + "\n".join(map(_directive, FURTHER["tools"]))
    return pages


def _index() -> str:
    """The list of all public names."""
    lines = ["# API reference", "", "Every public name of `monoblock`, imported from the package itself.", ""]
    for page, (title, _) in API.items():
        links = ", ".join(f"[`{name}`]({page}.md#monoblock.{name})" for name in names_of(page))
        lines += [f"## [{title}]({page}.md)", "", links, ""]
    lines += ["## [Tools](tools.md)", "", "The embedded model, attention masks as pictures, converting.", ""]
    return "\n".join(lines)


def _directive(name: str) -> str:
    """mkdocstrings' directive for one object, with the members that a reader needs."""
    made = name.rpartition(".")[2] in monoblock._MADE
    if made and name.endswith(("PreTrainedModel", "MainLayer")):
        options = "      members: false\n      show_signature: false\n      show_bases: true\n"
    elif made:
        options = f"      members: [{', '.join(CALLS)}]\n      show_bases: true\n"
    elif re.fullmatch(r"monoblock\.(Flax|TF)?Auto(Model\w*)", name):
        options = "      members: [from_pretrained, from_config]\n      inherited_members: true\n"
    elif name.endswith("PreTrainedModel"):
        options = "      inherited_members: true\n"
    else:
        options = ""
    return f"::: {name}\n" + (f"    options:\n{options}" if options else "")


def root_pages() -> dict[str, str]:
    """Documents of the root and examples as pages: path -> Markdown."""
    pages = {}
    for name, page in DOCUMENTS.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        pages[page] = relinked(text, "") if name.endswith(".md") else f"# Licence\n\n```text\n{text}```\n"
    for path in sorted((ROOT / "examples").glob("*.py")):
        code = path.read_text(encoding="utf-8")
        pages[f"examples/{path.stem}.md"] = f"# {path.name}\n\n```python\n{code}```\n"
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        pages[f"examples/{path.stem}.md"] = notebook(path)
    return pages


def notebook(path: Path) -> str:
    """A notebook as Markdown: its texts, code, printed lines and pictures."""
    found: list[str] = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            found.append(source.replace("](../docs/", "](../"))
            continue
        found.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = {kind: "".join(text) for kind, text in output.get("data", {}).items()}
            if "image/png" in data:
                found.append(f"![a picture](data:image/png;base64,{data['image/png'].strip()})")
            elif picture := data.get("image/svg+xml", data.get("text/html")):
                found.append(picture)
            elif text := data.get("text/plain", "".join(output.get("text", ""))):
                found.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(found) + "\n"


def relinked(text: str, folder: str) -> str:
    """Markdown of a document in `folder` of the repository ("" or "docs") with links to the site's pages."""

    def link(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        if "://" in target or not target:
            return found[0]
        path = (Path(folder) / target).as_posix() if folder else target
        path = re.sub(r"^docs/\.\./", "", path)
        if path in DOCUMENTS:
            path = DOCUMENTS[path]
        elif path.startswith("examples/"):
            path = f"{Path(path).with_suffix('')}.md"
        else:
            path = path.removeprefix("docs/")
        return f"]({path}{anchor})"

    return re.sub(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", link, text)


def on_files(files: Any, config: Any) -> Any:
    """MkDocs' hook: add the generated pages."""
    from mkdocs.structure.files import File

    for path, text in {**root_pages(), **api_pages()}.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """MkDocs' hook: links of the documents in docs/ to files outside of it."""
    generated: Iterable[str] = {**dict.fromkeys(DOCUMENTS.values()), "api": None}
    if page.file.src_uri in generated or page.file.src_uri.startswith(("api/", "examples/")):
        return markdown
    return relinked(markdown, "docs")
