"""Loads a model and makes its engine."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from monoblock.pipelines.frameworks import FRAMEWORKS, of_model
from monoblock.serving.engine.engine import Engine
from monoblock.serving.engine.options import EngineOptions

SHARDED, STAGES = "tensor_parallel", "pipeline_parallel"  # the arguments' names in errors


def load_engine(
    model: str | None,
    *,
    options: EngineOptions | None = None,
    name: str | None = None,
    dtype: str = "auto",
    quantize: str | None = None,
    device: str = "auto",
    adapter: str | None = None,
    hub: dict[str, Any] | None = None,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
) -> Engine:
    """The engine of a model in a folder or on the hub; None: the embedded demo.

    `name`: under which it is served; `quantize`: "int8", "int4" or "lossless"; `device`: "auto" (a GPU if there is
    one), "cpu", "cuda", ...; `adapter`: folder or name of a LoRA adapter; `hub`: download options of `from_pretrained`;
    `tensor_parallel` or `pipeline_parallel`: processes that hold shards or layers of the model, this one and others
    that are started.
    ImportError without PyTorch; ValueError for a model that does not generate text, whose tokenizer is missing, or that
    cannot be sharded; RuntimeError if a process fails.
    """
    import monoblock

    framework = FRAMEWORKS["pt"]
    if framework.missing() is not None:
        raise ImportError(f"the engine runs on {framework.name}, which is not installed: {framework.install}")
    if model is None:
        from monoblock import demo

        path, name = str(demo.path()), name or "demo"
    else:
        path = model
    where = hub or {}
    arguments: dict[str, Any] = {"dtype": dtype, **where}
    if quantize is not None:
        arguments["quantization_config"] = quantize
    tokenizer: Any = monoblock.AutoTokenizer.from_pretrained(path, **where)
    if tensor_parallel > 1 or pipeline_parallel > 1:
        count, stages = max(tensor_parallel, pipeline_parallel), pipeline_parallel > 1
        if stages and tensor_parallel > 1:
            raise ValueError(f"{SHARDED} and {STAGES} do not go together: give one")
        if adapter is not None:
            raise ValueError(
                f"{STAGES if stages else SHARDED}={count}: an adapter is not supported; merge it into the model's files"
            )
        found = options or EngineOptions()
        return _on_processes(path, arguments, tokenizer, found, name or model, where, device, count, stages)
    arguments |= framework.engine_adapter.placement(device)
    loaded: Any = monoblock.AutoModelForCausalLM.from_pretrained(path, **arguments)
    if adapter is not None:
        loaded.load_adapter(adapter)
    return make_engine(
        loaded, tokenizer, options=options, name=name or model, processor=processor_of(loaded, path, where)
    )


def _on_processes(
    path: str,
    arguments: dict[str, Any],
    tokenizer: Any,
    options: EngineOptions,
    name: str | None,
    where: dict[str, Any],
    device: str,
    count: int,
    stages: bool,
) -> Engine:
    """The engine of a model of which this process and count - 1 others hold shards, or stages."""
    import monoblock

    framework = FRAMEWORKS["pt"]
    spec = monoblock.AutoConfig.from_pretrained(path, **where).to_spec()
    backend = framework.sharded_engine
    framework.processes.check(spec, count, device, STAGES if stages else SHARDED, stages=stages)
    work = follow_stage if stages else follow
    peers = framework.processes.Peers(count, device, work, path, arguments)
    try:
        model = _part(path, arguments, stages)
        make = backend.PipelineRunner if stages else backend.ShardedRunner
        runner = make(model, peers, options.cache_memory)
        processor = processor_of(model, path, where)
        engine = Engine(model, tokenizer, runner, name=name or "", processor=processor, options=options)
    except Exception as error:
        if isinstance(error, RuntimeError):  # perhaps because another process has failed
            error = peers.lost(error)
        peers.close()
        raise error from None
    weakref.finalize(engine, peers.close)
    return engine


def _part(path: str, arguments: dict[str, Any], stages: bool) -> Any:
    """This process's shard or stage of a model."""
    import monoblock

    load = monoblock.AutoModelForCausalLM.from_pretrained
    if not stages:
        return load(path, **arguments, tp_plan="auto").eval()
    with FRAMEWORKS["pt"].processes.as_stage() as device:
        return load(path, **arguments, **device).eval()


def follow(receive: Callable[[], Any], path: str, arguments: dict[str, Any]) -> None:
    """The work of a process other than the first, with a shard."""
    FRAMEWORKS["pt"].sharded_engine.follow(_part(path, arguments, False), receive)


def follow_stage(receive: Callable[[], Any], path: str, arguments: dict[str, Any]) -> None:
    """The work of a process other than the first, with a stage."""
    FRAMEWORKS["pt"].sharded_engine.follow_stage(_part(path, arguments, True), receive)


def make_engine(
    model: Any,
    tokenizer: Any,
    *,
    options: EngineOptions | None = None,
    name: str | None = None,
    processor: Any = None,
) -> Engine:
    """The engine of one of monoblock's PyTorch models. ValueError for other models, or one that does not generate."""
    options = options or EngineOptions()
    framework = of_model(model)
    if framework is not FRAMEWORKS["pt"]:
        raise ValueError(
            f"the engine runs PyTorch models, got {type(model).__name__}: load the model without its prefix"
        )
    runner = framework.engine_adapter.runner(model, options.cache_memory, options.max_model_len)
    return Engine(model, tokenizer, runner, name=name or "", processor=processor, options=options)


def processor_of(model: Any, path: str, where: dict[str, Any]) -> Any:
    """The processor of an image-text model, else None."""
    from monoblock.families import AUTO

    if model.row.name not in AUTO["AutoModelForImageTextToText"]:
        return None
    from monoblock import AutoProcessor

    return AutoProcessor.from_pretrained(path, **where)
