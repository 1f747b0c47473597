"""`pipeline`: loads a task's model, tokenizer and processor from names, folders or objects."""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from typing import Any

from monoblock import demo, families
from monoblock.checkpoint.contents import SENTENCE_TRANSFORMERS
from monoblock.checkpoint.formats import lacks
from monoblock.checkpoint.hub import HubOptions, find_file, find_weights
from monoblock.checkpoint.options import pop_remote_code
from monoblock.checkpoint.store import open_store
from monoblock.pipelines import frameworks
from monoblock.pipelines.frameworks import Framework

# task -> its class, in the module of the task's name, and the Auto class that loads its model.
TASKS: dict[str, tuple[str, str]] = {
    "text-generation": ("TextGenerationPipeline", "AutoModelForCausalLM"),
    "text-classification": ("TextClassificationPipeline", "AutoModelForSequenceClassification"),
    "token-classification": ("TokenClassificationPipeline", "AutoModelForTokenClassification"),
    "question-answering": ("QuestionAnsweringPipeline", "AutoModelForQuestionAnswering"),
    "fill-mask": ("FillMaskPipeline", "AutoModelForMaskedLM"),
    "feature-extraction": ("FeatureExtractionPipeline", "AutoModel"),
    "sentence-similarity": ("SentenceSimilarityPipeline", "SentenceTransformer"),
    "zero-shot-classification": ("ZeroShotClassificationPipeline", "AutoModelForSequenceClassification"),
    "image-text-to-text": ("ImageTextToTextPipeline", "AutoModelForImageTextToText"),
}
ALIASES = {"sentiment-analysis": "text-classification", "ner": "token-classification"}
# Suffix of a class name in a config's `architectures` -> its task; longer suffixes first.
DEFAULTS = {
    "FuyuForCausalLM": "image-text-to-text",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "DoubleHeadsModel": "",
    "Model": "feature-extraction",
}
SIMILARITY = "sentence-similarity"  # whose model is a `SentenceTransformer`
HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
# Arguments of transformers' `pipeline` that are not supported: their values without effect, and the reason.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "feature_extractor": ((), "no model here takes audio"),
    "video_processor": ((), "no model here takes videos"),
    "pipeline_class": ((), "construct your own class instead"),
    "use_fast": ((True,), "all tokenizers here are fast"),
}


def pipeline(
    task: str | None = None,
    model: Any = None,
    config: Any = None,
    tokenizer: Any = None,
    *,
    image_processor: Any = None,
    processor: Any = None,
    framework: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    device: Any = None,
    device_map: Any = None,
    dtype: Any = None,
    torch_dtype: Any = None,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """A pipeline: a model with the preprocessing of its inputs and the postprocessing of its outputs.

    Args:
        task: one of `monoblock.pipelines.TASKS`, or an alias ("sentiment-analysis", "ner"); by default the task of the
            model's architecture.
        model: a name on the hub, a folder, or a model object. The default for "text-generation" is the embedded demo
            model.
        config, tokenizer, image_processor, processor: names, folders or objects; by default those of the model.
        framework: "pt", "flax" or "tf", whose classes load the model; by default that of a model object, else the first
            installed one, in this order.
        revision, token: the version on the hub, and the access token.
        device: a device name of the framework ("cpu", "cuda:0", "gpu:0"), the index of an accelerator, or -1 for the
            CPU; by default the first accelerator, if there is one.
        dtype (or torch_dtype): the dtype of weights and computation, by default ("auto") the checkpoint's.
        device_map, model_kwargs: for the model's `from_pretrained`.
        kwargs: `batch_size`, and default options of the task.

    Returns:
        A `Pipeline`, to be called with inputs. ValueError or TypeError for an unknown argument or value, with the
        closest known name; ImportError with the pip command for a framework that is not installed.
    """
    _refuse(kwargs)
    pop_remote_code(kwargs)
    if device is not None and device_map is not None:
        raise ValueError("device and device_map exclude each other: pass one")
    loading = _loading(
        model_kwargs,
        revision=revision,
        token=token,
        device_map=device_map,
        dtype=dtype,
        torch_dtype=torch_dtype,
    )
    if task is not None:
        task = known_task(task)
    if model is None:
        model = _default(task, tokenizer)
    source = model if isinstance(model, str | Path) else None
    if task == SIMILARITY or (task is None and _is_embedder(model)):
        components = {"tokenizer": tokenizer, "image_processor": image_processor, "processor": processor}
        loaded_model = _embedder(model, config, framework, device, loading)
        return _class_of(SIMILARITY)(
            loaded_model, device=device if source is None else None, **components, **kwargs
        )
    hub = {name: loading[name] for name in HUB if name in loading}
    if source is None:
        named = any(
            isinstance(component, str | Path) for component in (tokenizer, image_processor, processor)
        )
        frameworks.of_model(model, framework)
        _check_object(config, {k: v for k, v in loading.items() if not (named and k in HUB)})
        task = task or default_task([type(model).__name__])
        loaded_model = model
    else:
        loaded_model, task = _load(frameworks.chosen(framework), task, source, config, device, loading)
    components = _components(task, source, hub, tokenizer, image_processor, processor)
    return _class_of(task)(loaded_model, device=device, **components, **kwargs)


def _class_of(task: str) -> Any:
    module = importlib.import_module(f"monoblock.pipelines.{task.replace('-', '_')}")
    return getattr(module, TASKS[task][0])


def _is_embedder(model: Any) -> bool:
    """Whether an object is a `SentenceTransformer`."""
    return hasattr(model, "similarity_fn_name") and hasattr(model, "transformers_model")


def _embedder(model: Any, config: Any, framework: str | None, device: Any, loading: dict[str, Any]) -> Any:
    """The model of the task "sentence-similarity"."""
    import monoblock

    if not isinstance(model, str | Path):
        if not _is_embedder(model):
            raise TypeError(
                f"{SIMILARITY!r} needs the name or folder of a model, or a SentenceTransformer; got "
                f"{type(model).__name__}"
            )
        frameworks.of_model(model.transformers_model, framework)
        _check_object(config, loading)
        return model
    if config is not None:
        raise ValueError(f"{SIMILARITY!r} uses the config of the model: leave out config")
    renamed = {"cache_dir": "cache_folder"}
    where = {renamed.get(name, name): loading.pop(name) for name in HUB if name in loading}
    for name in ("force_download", "subfolder"):
        if where.pop(name, None):
            raise ValueError(f"{SIMILARITY!r} does not support {name}: pass a folder")
    return monoblock.SentenceTransformer(
        model, device=device, framework=framework, model_kwargs=loading or None, **where
    )


def known_task(task: str) -> str:
    """The task of that name or alias; ValueError with the closest name for an unknown one."""
    task = ALIASES.get(task, task)
    if task in TASKS:
        return task
    names = [*TASKS, *ALIASES]
    near = difflib.get_close_matches(str(task), names, 1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"there is no task {task!r}; {hint}The tasks are: {', '.join(names)}")


def default_task(architectures: Any) -> str:
    """The task of a model with these architectures."""
    for name in architectures or ():
        for ending, task in DEFAULTS.items():
            if name.endswith(ending) and task:
                return task
    found = ", ".join(architectures or ()) or "no class"
    raise ValueError(
        f"the config names {found}, which has no default task: pass task=, one of {', '.join(TASKS)}"
    )


def _refuse(kwargs: dict[str, Any]) -> None:
    for name, (harmless, why) in REFUSED.items():
        value = kwargs.pop(name, None)
        if value is not None and value not in harmless:
            raise ValueError(f"pipeline does not support {name}={value!r}: {why}")


def _loading(model_kwargs: dict[str, Any] | None, **given: Any) -> dict[str, Any]:
    """The keywords of the model's `from_pretrained`; ValueError for one that is given twice."""
    loading = dict(model_kwargs or {})
    for name, value in given.items():
        if value is not None and name in loading:
            raise ValueError(f"{name} is given twice: as an argument and in model_kwargs")
        if value is not None:
            loading[name] = value
    if "torch_dtype" in loading:
        if "dtype" in loading:
            raise ValueError("dtype and torch_dtype are the same argument: pass one")
        loading["dtype"] = loading.pop("torch_dtype")
    return loading


def _check_object(config: Any, loading: dict[str, Any]) -> None:
    """ValueError for loading options together with a model object."""
    unused = [*(["config"] if config is not None else []), *(k for k, v in loading.items() if v != "auto")]
    if unused:
        raise ValueError(f"{unused[0]} has no effect on a model object: pass the model's name or folder")


def _default(task: str | None, tokenizer: Any) -> str:
    if tokenizer is not None:
        raise ValueError("a tokenizer without a model: pass model= as well")
    if task is None:
        raise ValueError("pass a task, a model, or both")
    if task != "text-generation":
        raise ValueError(f"{task!r} has no default model: pass model=, a name on the hub or a folder")
    return str(demo.path())


def _load(
    framework: Framework, task: str | None, source: Any, config: Any, device: Any, loading: dict[str, Any]
) -> tuple[Any, str]:
    """The model of a name or folder, and its task."""
    import monoblock

    if config is None or isinstance(config, str | Path):
        hub = {name: loading[name] for name in HUB if name in loading}
        config = monoblock.AutoConfig.from_pretrained(source if config is None else config, **hub)
    inferred = task is None
    task = task or default_task(config.architectures)
    if task == "fill-mask" and _has_no_head(source, config, loading):
        if not inferred:
            raise ValueError(
                f"{source} has no head for 'fill-mask', only the weights that sentence-transformers needs: its task is "
                "'feature-extraction'"
            )
        task = "feature-extraction"
    auto = getattr(monoblock, framework.prefix + TASKS[task][1])
    return framework.adapter.load(auto, source, device, config=config, **loading), task


def _has_no_head(source: Any, config: Any, loading: dict[str, Any]) -> bool:
    """Whether these are files of sentence-transformers without the head of the class that their config still names."""
    options = HubOptions(**{name: loading[name] for name in HUB if name in loading})
    if find_file(source, SENTENCE_TRANSFORMERS, options, required=False) is None:
        return False
    given = {name: loading[name] for name in ("variant", "use_safetensors") if name in loading}
    store = open_store(find_weights(source, options, **given), "np")
    rows = families.family(config.model_type).classes
    return all(lacks(config, row, store) for row in rows if row.head == "masked")


def _components(
    task: str, source: Any, hub: dict[str, Any], tokenizer: Any, image_processor: Any, processor: Any
) -> dict[str, Any]:
    """The tokenizer, and the processor of a task with images; loaded if given as names."""
    import monoblock

    def loaded(what: Any, auto: str) -> Any:
        named = source if what is None else what
        return (
            getattr(monoblock, auto).from_pretrained(named, **hub) if isinstance(named, str | Path) else what
        )

    if task != "image-text-to-text":
        if image_processor is not None:
            raise ValueError(f"{task!r} takes no images: leave out image_processor")
        if processor is not None:
            processor = loaded(processor, "AutoProcessor")
            if tokenizer is None:
                return {"processor": processor}
        return {"tokenizer": loaded(tokenizer, "AutoTokenizer"), "processor": processor}
    if processor is None and tokenizer is not None and image_processor is not None:
        images = loaded(image_processor, "AutoImageProcessor")
        return {"processor": monoblock.FuyuProcessor(images, loaded(tokenizer, "AutoTokenizer"))}
    processor = loaded(processor, "AutoProcessor")
    if tokenizer is not None or image_processor is not None:
        raise ValueError("pass processor=, or both image_processor= and tokenizer=")
    return {"processor": processor}
