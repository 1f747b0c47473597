"""`ModuleSequence`: what `SentenceTransformer` and `CrossEncoder` share: modules, device, files, processes."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from monoblock import demo_embeddings
from monoblock.checkpoint.hub import HubOptions
from monoblock.checkpoint.transaction import staged
from monoblock.embeddings import files
from monoblock.embeddings import pool as processes
from monoblock.embeddings.modules import SAVED_PATH
from monoblock.pipelines.progress import with_progress_bar

log = logging.getLogger("monoblock")

# Names on the hub without an organisation that are not those of sentence-transformers.
PLAIN_NAMES = ("openai-gpt",)
# Methods of the package that are not here.
REFUSED = {
    "fit": "train the PyTorch model with forward(), whose results have gradients",
    "old_fit": "train the PyTorch model with forward(), whose results have gradients",
    "evaluate": "encode the texts and compute the measure from the vectors",
    "push_to_hub": "save to a folder, then `hf upload REPO FOLDER`",
    "save_to_hub": "save to a folder, then `hf upload REPO FOLDER`",
    "compile": "compile the model: st[0].auto_model.compile()",
    "add_adapter": "use the model's: st[0].auto_model.add_adapter(...)",
    "load_adapter": "use the model's: st[0].auto_model.load_adapter(...)",
}


class ModuleSequence:
    """Modules in order, of which the first is a `Transformer`: what `SentenceTransformer` and `CrossEncoder` share."""

    modules: list[Any]

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.modules)

    def __getitem__(self, index: Any) -> Any:
        return self.modules[index]

    def __getattr__(self, name: str) -> Any:
        if name in REFUSED:
            raise NotImplementedError(f"{type(self).__name__} has no {name}: {REFUSED[name]}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        lines = [f"  ({index}): {module!r}" for index, module in enumerate(self)]
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])

    # ------------------------------------------------------------------ the transformer

    @property
    def transformer(self) -> Any:
        """The first module."""
        return self.modules[0]

    @property
    def transformers_model(self) -> Any:
        """The model of the first module."""
        return self.transformer.auto_model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the first module."""
        return self.transformer.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self.transformer.tokenizer = tokenizer

    processor = tokenizer

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.transformer.config

    @property
    def max_seq_length(self) -> int | None:
        """The maximum of tokens per text, special tokens included; None: unlimited."""
        return self.transformer.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        self.transformer.max_seq_length = value

    def get_max_seq_length(self) -> int | None:
        """The maximum of tokens per text."""
        return self.max_seq_length

    def tokenize(self, texts: Sequence[Any], **options: Any) -> dict[str, Any]:
        """The inputs of `forward` for texts: arrays of the framework, padded and truncated."""
        return self.transformer.tokenize(texts, **options)

    preprocess = tokenize

    def forward(self, features: Mapping[str, Any]) -> dict[str, Any]:
        """The features [texts, tokens, ...] with the results of all modules; with gradients on PyTorch."""
        found = dict(features)
        for module in self:
            found = module(found)
        return found

    def __call__(self, features: Mapping[str, Any]) -> dict[str, Any]:
        return self.forward(features)

    # ------------------------------------------------------------------ prompts

    prompts: dict[str, str]
    default_prompt_name: str | None

    def set_prompts(self, prompts: Mapping[str, str], default: str | None) -> None:
        """The prompts by name, and the name of the prompt of calls without one."""
        for name, text in prompts.items():
            if not isinstance(text, str):
                raise TypeError(f"prompts[{name!r}] is a {type(text).__name__}: expected a string")
        self.prompts, self.default_prompt_name = dict(prompts), default
        if default is not None:
            self.prompt_text(None, default)

    def prompt_text(self, prompt: str | None, name: str | None) -> str:
        """The prompt of a call, given itself or by name; "" for none."""
        if prompt is not None:
            if name is not None:
                raise ValueError("prompt and prompt_name exclude each other: pass one")
            return prompt
        name = self.default_prompt_name if name is None else name
        if name is None:
            return ""
        if name not in self.prompts:
            known = ", ".join(map(repr, self.prompts)) or "none"
            raise ValueError(f"there is no prompt {name!r}; the prompts are: {known}")
        return self.prompts[name]

    # ------------------------------------------------------------------ device and dtype

    @property
    def device(self) -> Any:
        """The model's device."""
        return self.transformer.adapter.device

    @property
    def dtype(self) -> Any:
        """The dtype of the model's weights."""
        return self.transformer.adapter.dtype

    def to(self, device: Any = None, dtype: Any = None) -> Any:
        """Move the model and the other modules to a device, or convert them to a dtype of PyTorch."""
        if dtype is None and str(device).startswith("torch.") and not hasattr(device, "type"):
            device, dtype = None, device
        if device is not None:
            self.transformer.adapter.to(device)
        if dtype is not None:
            self.transformer.adapter.cast(dtype)
        self._place()
        return self

    def half(self) -> Any:
        """Convert to float16."""
        return self.to(dtype="float16")

    def bfloat16(self) -> Any:
        """Convert to bfloat16."""
        return self.to(dtype="bfloat16")

    def float(self) -> Any:
        """Convert to float32."""
        return self.to(dtype="float32")

    def cpu(self) -> Any:
        """Move to the CPU."""
        return self.to("cpu")

    def cuda(self, device: int | None = None) -> Any:
        """Move to a GPU."""
        return self.to("cuda" if device is None else f"cuda:{device}")

    def _place(self) -> None:
        for module in self.modules[1:]:
            module.place(self.transformer.adapter)

    def train(self, mode: bool = True) -> Any:
        """Enable dropout, or disable it."""
        self.transformer.adapter.train(mode)
        return self

    def eval(self) -> Any:
        """Disable dropout."""
        return self.train(False)

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """The parameters of all modules by name: "0.auto_model....", "2.linear.weight"."""
        for index, module in enumerate(self):
            for name, value in module.named_parameters():
                yield f"{index}.{name}", value

    def parameters(self) -> Iterator[Any]:
        """The parameters of all modules."""
        return (value for _, value in self.named_parameters())

    def limit_threads(self, count: int) -> None:
        """The number of threads of this process, for pools."""
        self.transformer.adapter.limit_threads(count)

    # ------------------------------------------------------------------ pools

    method = ""  # that a pool's processes call

    def write(self, folder: Path) -> None:
        """Write all files, which the class's constructor reads."""
        raise NotImplementedError

    def loading(self) -> dict[str, Any]:
        """The constructor's arguments with which a process of a pool reads the saved model."""
        return {"framework": self.transformers_model.framework}

    def start_multi_process_pool(self, target_devices: Sequence[str] | None = None) -> dict[str, Any]:
        """Start processes that encode: one per device, by default per GPU, or four on the CPU.

        They read the model from a temporary folder. Pass the result as `pool`, and stop it at the end.
        """
        devices = self.transformer.adapter.devices() if target_devices is None else list(target_devices)
        return processes.start(self, [str(device) for device in devices], self.method)

    @staticmethod
    def stop_multi_process_pool(pool: dict[str, Any]) -> None:
        """End the processes of `start_multi_process_pool`."""
        processes.stop(pool)

    def _in_pool(
        self,
        inputs: Sequence[Any],
        pool: Any,
        device: Any,
        chunk_size: int | None,
        shown: bool,
        **options: Any,
    ) -> list[Any]:
        """The results of the inputs' chunks."""
        if pool is not None:
            with progress(len(inputs), shown) as advance:
                return processes.run(pool, inputs, options, chunk_size, advance)
        own = self.start_multi_process_pool(device)
        try:
            return self._in_pool(inputs, own, None, chunk_size, shown, **options)
        finally:
            self.stop_multi_process_pool(own)


@contextlib.contextmanager
def progress(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A function that advances a progress bar by a number of inputs."""
    steps = with_progress_bar(iter(range(total)), total, shown)

    def advance(count: int) -> None:
        for _ in range(count):
            next(steps, None)

    try:
        yield advance
    finally:
        if isinstance(steps, Generator):
            steps.close()


def shows_bar(wanted: bool | None) -> bool:
    """Whether a progress bar is shown: by default if the logger "monoblock" logs INFO or DEBUG."""
    return log.getEffectiveLevel() in (logging.INFO, logging.DEBUG) if wanted is None else bool(wanted)


def hub_options(
    name: Any, cache_folder: Any, revision: Any, token: Any, local: bool, owner: str | None = None
) -> tuple[Any, HubOptions]:
    """The model's name, with the owner if it names none, and the download options; the folder of the embedded search
    model for its name."""
    if name == demo_embeddings.NAME and not Path(name).exists():
        name = str(demo_embeddings.path())
    plain = isinstance(name, str) and "/" not in name and name not in PLAIN_NAMES
    if owner is not None and plain and not Path(name).expanduser().exists():
        name = f"{owner}/{name}"
    folder = cache_folder or os.environ.get("SENTENCE_TRANSFORMERS_HOME")
    return name, HubOptions(revision=revision, token=token, cache_dir=folder, local_files_only=local)


def check_call(batch_size: Any) -> None:
    """ValueError for an invalid batch size."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: expected an integer of at least 1")


def check_backend(backend: Any, trust_remote_code: Any) -> None:
    """ValueError for another backend than PyTorch's."""
    if backend != "torch":
        raise ValueError(f"backend={backend!r} is not supported; use framework='pt', 'flax' or 'tf'")
    if trust_remote_code:
        raise ValueError("trust_remote_code=True is not supported: code in a model's folder is never run")


def save(model: ModuleSequence, folder: Path, kind: str, extra: Mapping[str, Any]) -> None:
    """Write the modules, modules.json and config_sentence_transformers.json."""
    if folder.is_file():
        raise ValueError(f"save_pretrained needs a folder, but {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for index, module in enumerate(model):
        inner = "" if index == 0 else f"{index}_{module.folder}"
        module.save(folder / inner)
        name = "Transformer" if index == 0 else module.folder
        entries.append({"idx": index, "name": str(index), "path": inner, "type": SAVED_PATH + name})
    settings = {
        "model_type": kind,
        "__version__": files.versions(),
        "prompts": model.prompts,
        "default_prompt_name": model.default_prompt_name,
        **extra,
    }
    with staged(folder) as stage:
        stage.write("modules.json", files.as_json(entries))
        stage.write(files.CONFIG, files.as_json(settings))


def merged(kwargs: Mapping[str, Any] | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments with those that are given on their own."""
    found = dict(kwargs or {})
    for name, value in given.items():
        if value is not None:
            if name in found:
                raise ValueError(f"{name} is given twice: as an argument and in model_kwargs")
            found[name] = value
    return found


def both(name: str, value: Any, old: str, old_value: Any) -> Any:
    """The value of an argument with two names."""
    if value is not None and old_value is not None:
        raise ValueError(f"{name} and {old} are the same argument: pass one")
    return old_value if value is None else value
