"""The modules of a `SentenceTransformer`: a transformer, pooling, and what follows.

A module is called with features, a dictionary of arrays, and returns it with its own results added. The arrays are
tensors of PyTorch, with gradients, or NumPy arrays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from monoblock.checkpoint.hub import HubOptions, find_file, find_weights, read_json
from monoblock.checkpoint.save import save_tensors
from monoblock.checkpoint.store import open_store
from monoblock.checkpoint.transaction import write_atomically
from monoblock.embeddings.arrays import ACTIVATIONS, HOST, Array, EmbeddingOps, host
from monoblock.embeddings.files import as_json, check_keys
from monoblock.embeddings.pooling import POOLS, pooled
from monoblock.errors import CheckpointError
from monoblock.field_types import checked
from monoblock.pipelines import frameworks

Features = dict[str, Any]

# The package's class paths begin with these; the last component is the class.
PACKAGE = "sentence_transformers."
SAVED_PATH = "sentence_transformers.models."

# Keys of an old config of pooling -> the mode.
_OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATION = re.compile(r"torch\.nn\.(?:modules\.(?:activation|linear)\.)?(\w+)")


def ops_of(array: Array) -> EmbeddingOps:
    """The operations for an array: PyTorch's for a tensor, else NumPy's."""
    if hasattr(array, "detach"):
        return frameworks.FRAMEWORKS["pt"].embedding_adapter.OPS
    return HOST


class EmbeddingModule:
    """Base of the modules after the transformer."""

    folder: ClassVar[str] = ""  # the ending of the folder's name in a saved model
    names: ClassVar[tuple[str, ...]] = ()  # of the parameters: attributes of the module
    stored: ClassVar[str] = ""  # prefix of the parameters' names in files

    def __call__(self, features: Features) -> Features:
        return self.forward(features)

    def forward(self, features: Features) -> Features:
        """The features with this module's results."""
        raise NotImplementedError

    def get_config_dict(self) -> dict[str, Any]:
        """The content of the module's config.json."""
        return {}

    def get_embedding_dimension(self) -> int | None:
        """The width of the results; None: that of the module before."""
        return None

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """The parameters by name."""
        for name in self.names:
            if (value := getattr(self, name)) is not None:
                yield f"{self.stored}.{name}", value

    def place(self, adapter: Any) -> None:
        """Make the parameters those of the model's framework, on its device and in its dtype."""
        for name in self.names:
            value = getattr(self, name)
            if value is not None and hasattr(adapter, "parameter"):
                if isinstance(value, np.ndarray):
                    setattr(self, name, adapter.parameter(value))
                else:
                    adapter.place(value)

    def save(self, folder: str | Path) -> None:
        """Write config.json, and the parameters to model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = as_json(self.get_config_dict())
        tensors = {name: np.ascontiguousarray(host(value)) for name, value in self.named_parameters()}
        if tensors:
            save_tensors(folder, tensors, framework="np", extra_files={"config.json": text})
        else:
            write_atomically(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def read(cls, name: str | Path, options: HubOptions) -> Self:
        """The module of a folder or a repository on the hub."""
        path = find_file(name, "config.json", options)
        assert path is not None
        module = cls.from_config(read_json(path), path)
        if module.names:
            store = open_store(find_weights(name, options), "np")
            for key, value in list(module.named_parameters()):
                if key not in store:
                    raise CheckpointError(f"{path.parent}: the weights of {cls.__name__} lack {key!r}")
                found = np.array(store.tensor(key), np.float32)
                if found.shape != value.shape:
                    raise CheckpointError(
                        f"{path.parent}: {key} has the shape {list(found.shape)}; {path.name} gives "
                        f"{list(value.shape)}"
                    )
                setattr(module, key.rpartition(".")[2], found)
        return module

    @classmethod
    def from_config(cls, config: Mapping[str, Any], path: Path) -> Self:
        """The module with this config, of the file `path`."""
        check_keys(config, (), path)
        return cls()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.get_config_dict()})"


class Pooling(EmbeddingModule):
    """One vector per text from the vectors of its tokens.

    `pooling_mode`: "cls" (the first token), "max", "mean", "mean_sqrt_len_tokens" (the sum divided by the square root
    of the number of tokens), "weightedmean" (weights 1, 2, 3, ... by position), "lasttoken", or several of them, whose
    results are concatenated in this order. `include_prompt=False` leaves the tokens of a prompt out. The keywords of
    older versions (`word_embedding_dimension`, `pooling_mode_mean_tokens=True`, ...) are taken as well.
    """

    folder = "Pooling"

    def __init__(
        self,
        embedding_dimension: int | None = None,
        pooling_mode: str | Sequence[str] | None = None,
        include_prompt: bool = True,
        **old: Any,
    ) -> None:
        width = old.pop("word_embedding_dimension", embedding_dimension)
        if unknown := [name for name in old if name not in _OLD_MODES]:
            raise TypeError(f"Pooling has no argument {unknown[0]!r}")
        if pooling_mode is None:
            pooling_mode = [mode for key, mode in _OLD_MODES.items() if old.get(key)] or "mean"
        modes = (pooling_mode,) if isinstance(pooling_mode, str) else tuple(pooling_mode)
        for mode in modes:
            if mode not in POOLS:
                raise ValueError(f"pooling_mode={mode!r}: expected one of {', '.join(map(repr, POOLS))}")
        if not modes:
            raise ValueError("pooling_mode is empty: give at least one mode")
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f"embedding_dimension={width!r}: expected the width of the transformer's states")
        self.modes = modes
        self.embedding_dimension = width
        self.include_prompt = include_prompt

    @property
    def pooling_mode(self) -> str | tuple[str, ...]:
        """The mode, or the modes."""
        return self.modes[0] if len(self.modes) == 1 else self.modes

    @property
    def pooling_output_dimension(self) -> int:
        """The width of a text's vector."""
        return self.embedding_dimension * len(self.modes)

    def get_embedding_dimension(self) -> int:
        return self.pooling_output_dimension

    def get_pooling_mode_str(self) -> str:
        """The modes, joined by "+"."""
        return "+".join(self.modes)

    def forward(self, features: Features) -> Features:
        states = features["token_embeddings"]
        ops = ops_of(states)
        mask = features.get("attention_mask")
        skipped = 0 if self.include_prompt else int(features.get("prompt_length") or 0)
        vectors = pooled(ops, self.modes, states, ops.ones(states) if mask is None else mask, skipped)
        return {**features, "sentence_embedding": vectors}

    def get_config_dict(self) -> dict[str, Any]:
        """The keys of older versions of the package if they can express the modes, so that all versions read them."""
        order = [mode for mode in POOLS if mode in self.modes]
        if tuple(order) != self.modes:
            modes = {"embedding_dimension": self.embedding_dimension, "pooling_mode": list(self.modes)}
        else:
            flags = {key: mode in self.modes for key, mode in _OLD_MODES.items()}
            modes = {"word_embedding_dimension": self.embedding_dimension, **flags}
        return {**modes, "include_prompt": self.include_prompt}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], path: Path) -> Self:
        new = ("embedding_dimension", "pooling_mode")
        check_keys(config, (*new, "include_prompt", "word_embedding_dimension", *_OLD_MODES), path)
        mode = config.get("pooling_mode")
        if mode is not None:
            mode = [
                checked("config", "pooling_mode", one, str)
                for one in ([mode] if isinstance(mode, str) else mode)
            ]
        flags = {key: checked("config", key, config[key], bool) for key in _OLD_MODES if key in config}
        width = config.get("embedding_dimension", config.get("word_embedding_dimension"))
        try:
            return cls(width, mode, bool(config.get("include_prompt", True)), **flags)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error


class Dense(EmbeddingModule):
    """A linear layer with an activation.

    `activation_function`: "Tanh" (the default), "Identity", "ReLU", "Sigmoid", "GELU" or "SiLU", or a module or class
    of PyTorch with such a name; None means "Identity". `init_weight` [out, in] and `init_bias` [out] are the initial
    values; by default those of `torch.nn.Linear`, uniform between -1 / sqrt(in) and 1 / sqrt(in).
    """

    folder = "Dense"
    names = ("weight", "bias")
    stored = "linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation_function: Any = "Tanh",
        init_weight: Any = None,
        init_bias: Any = None,
        module_input_name: str = "sentence_embedding",
        module_output_name: str | None = None,
    ) -> None:
        self.in_features, self.out_features = in_features, out_features
        self.activation_function = activation(activation_function)
        self.module_input_name = module_input_name
        self.module_output_name = module_output_name or module_input_name
        limit = in_features**-0.5
        random = np.random.default_rng()

        def initial(given: Any, name: str, shape: tuple[int, ...]) -> np.ndarray:
            if given is None:
                return random.uniform(-limit, limit, shape).astype(np.float32)
            values = np.array(host(given))
            if values.shape != shape:
                raise ValueError(f"{name} has the shape {list(values.shape)}; expected {list(shape)}")
            return values

        self.weight: Any = initial(init_weight, "init_weight", (out_features, in_features))
        self.bias: Any = initial(init_bias, "init_bias", (out_features,)) if bias else None

    def get_embedding_dimension(self) -> int:
        return self.out_features

    def forward(self, features: Features) -> Features:
        x = features[self.module_input_name]
        ops = ops_of(x)
        result = ops.activation(self.activation_function, ops.linear(x, self.weight, self.bias))
        return {**features, self.module_output_name: result}

    def get_config_dict(self) -> dict[str, Any]:
        part = "linear" if self.activation_function == "Identity" else "activation"
        config: dict[str, Any] = {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "activation_function": f"torch.nn.modules.{part}.{self.activation_function}",
        }
        if (self.module_input_name, self.module_output_name) != ("sentence_embedding",) * 2:
            config["module_input_name"] = self.module_input_name
            config["module_output_name"] = self.module_output_name
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any], path: Path) -> Self:
        names = ("module_input_name", "module_output_name")
        check_keys(config, ("in_features", "out_features", "bias", "activation_function", *names), path)
        width, outputs = (
            checked("config", key, config.get(key), int) for key in ("in_features", "out_features")
        )
        try:
            function = activation(config.get("activation_function", "Tanh"))
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        return cls(
            width,
            outputs,
            checked("config", "bias", config.get("bias", True), bool),
            function,
            np.zeros((outputs, width), np.float32),
            np.zeros(outputs, np.float32),
            **{key: checked("config", key, config[key], str) for key in names if key in config},
        )


class LayerNorm(EmbeddingModule):
    """Layer normalisation of the texts' vectors, with scale and bias (epsilon 1e-5)."""

    folder = "LayerNorm"
    names = ("weight", "bias")
    stored = "norm"

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self.weight: Any = np.ones(dimension, np.float32)
        self.bias: Any = np.zeros(dimension, np.float32)

    def get_embedding_dimension(self) -> int:
        return self.dimension

    def forward(self, features: Features) -> Features:
        x = features["sentence_embedding"]
        return {**features, "sentence_embedding": ops_of(x).layer_norm(x, self.weight, self.bias, 1e-5)}

    def get_config_dict(self) -> dict[str, Any]:
        return {"dimension": self.dimension}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], path: Path) -> Self:
        check_keys(config, ("dimension",), path)
        return cls(checked("config", "dimension", config.get("dimension"), int))


class Normalize(EmbeddingModule):
    """Divides each text's vector by its length."""

    folder = "Normalize"

    def forward(self, features: Features) -> Features:
        x = features["sentence_embedding"]
        return {**features, "sentence_embedding": ops_of(x).normalized(x)}

    @classmethod
    def read(cls, name: str | Path, options: HubOptions) -> Self:
        del name, options  # it has no files
        return cls()

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)


KINDS: dict[str, type[EmbeddingModule]] = {
    kind.__name__: kind for kind in (Pooling, Dense, LayerNorm, Normalize)
}


def kind_of(path: str) -> str:
    """The class name in a class path of the package, as in modules.json; ValueError if it is not supported."""
    name = path.rpartition(".")[2]
    if path.startswith(PACKAGE) and (name == "Transformer" or name in KINDS):
        return name
    raise ValueError(
        f"the module type {path!r} is not supported; the modules here are Transformer, {', '.join(KINDS)}"
    )


def activation(given: Any) -> str:
    """The name in `ACTIVATIONS` of an activation: a name, a class path, a class or an object of torch.nn."""
    if given is None:
        return "Identity"
    if isinstance(given, str):
        match = _ACTIVATION.fullmatch(given)
        name = match[1] if match else given
    else:
        kind = given if isinstance(given, type) else type(given)
        name = (
            kind.__name__ if kind.__module__.startswith("torch.nn.") else f"{kind.__module__}.{kind.__name__}"
        )
    if name not in ACTIVATIONS:
        raise ValueError(
            f"activation_function={given!r}: expected one of {', '.join(ACTIVATIONS)} of torch.nn"
        )
    return name
