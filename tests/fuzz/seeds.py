"""Small valid files of every format, from which fuzzed inputs are derived."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from protobuf_writer import field

import monoblock

LINE = "the quick brown fox jumps over the lazy dog and runs away from the other dog in the garden"
WORDS = LINE.split()

# A config of each family, with optional fields.
CONFIGS: dict[str, dict[str, Any]] = {
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": 40,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "sliding_window": 9,
        "attention_dropout": 0.0,
        "torch_dtype": "float32",
        "transformers_version": "4.40.0",
        "id2label": {"0": "no", "1": "yes"},
        "label2id": {"no": 0, "yes": 1},
        "problem_type": "single_label_classification",
    },
    "mpt": {
        "architectures": ["MptForCausalLM"],
        "model_type": "mpt",
        "d_model": 24,
        "n_heads": 4,
        "n_layers": 2,
        "expansion_ratio": 2,
        "max_seq_len": 64,
        "vocab_size": 40,
        "resid_pdrop": 0.0,
        "layer_norm_epsilon": 1e-5,
        "emb_pdrop": 0.0,
        "learned_pos_emb": True,
        "attn_config": {
            "attn_type": "grouped_query_attention",
            "kv_n_heads": 2,
            "attn_pdrop": 0.0,
            "attn_impl": "torch",
            "clip_qkv": 6.0,
            "softmax_scale": None,
            "qk_ln": True,
            "alibi": False,
            "rope": True,
            "rope_impl": "hf",
            "rope_theta": 5000,
            "rope_hf_config": {"type": "linear", "factor": 2.0},
            "rope_dail_config": {"type": "original", "pos_idx_in_fp32": True, "xpos_scale_base": 512},
            "sliding_window_size": 6,
            "attn_temperature_tuning": {"floor_scale": 8192, "attn_scale": 0.0},
        },
        "init_device": "cpu",
        "logit_scale": "inv_sqrt_d_model",
        "no_bias": True,
        "verbose": 0,
        "norm_type": "low_precision_layernorm",
        "use_cache": False,
        "initializer_range": 0.02,
        "ffn_config": {"ffn_type": "mptglu", "ffn_hidden_size": 28, "ffn_act_fn": {"name": "silu"}},
        "init_config": {"name": "kaiming_normal_", "fan_mode": "fan_in"},
        "fc_type": {"name": "torch"},
        "torch_dtype": "float32",
    },
    "gpt_neo": {
        "architectures": ["GPTNeoForCausalLM"],
        "model_type": "gpt_neo",
        "vocab_size": 40,
        "max_position_embeddings": 64,
        "hidden_size": 24,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "attention_layers": ["global", "local"],
        "num_heads": 4,
        "intermediate_size": None,
        "window_size": 5,
        "activation_function": "gelu_new",
        "resid_dropout": 0,
        "embed_dropout": 0,
        "attention_dropout": 0,
        "classifier_dropout": 0.1,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "summary_type": "cls_index",
        "gradient_checkpointing": False,
        "task_specific_params": {
            "text-generation": {"do_sample": True, "max_length": 50, "temperature": 0.9}
        },
    },
    "openai-gpt": {
        "architectures": ["OpenAIGPTLMHeadModel"],
        "model_type": "openai-gpt",
        "vocab_size": 40,
        "n_positions": 64,
        "n_ctx": 64,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 4,
        "afn": "gelu",
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "summary_activation": None,
        "summary_proj_to_labels": True,
        "summary_first_dropout": 0.1,
        "summary_last_dropout": 0.0,
        "n_special": 0,
        "predict_special_tokens": True,
    },
    "mpnet": {
        "architectures": ["MPNetForMaskedLM"],
        "model_type": "mpnet",
        "vocab_size": 40,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 20,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": 66,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "relative_attention_num_buckets": 32,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    "fuyu": {
        "architectures": ["FuyuForCausalLM"],
        "model_type": "fuyu",
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_act": "relu2",
        "max_position_embeddings": 64,
        "image_size": 20,
        "patch_size": 4,
        "num_channels": 3,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "use_cache": True,
        "tie_word_embeddings": False,
        "rope_theta": 25000.0,
        "rope_scaling": None,
        "qk_layernorm": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "partial_rotary_factor": 0.5,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "image_token_id": 7,
        "text_config": {"model_type": "persimmon", "hidden_size": 32, "rope_theta": 25000.0},
    },
}

GENERATION: dict[str, Any] = {
    "_from_model_config": True,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
    "max_length": 20,
    "max_new_tokens": 4,
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 50,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "num_beams": 1,
    "bad_words_ids": [[5, 6]],
    "suppress_tokens": [7],
    "forced_eos_token_id": 2,
    "sequence_bias": [[[5], -1.0]],
    "stop_strings": ["###"],
    "exponential_decay_length_penalty": [10, 1.5],
    "cache_implementation": "dynamic",
    "transformers_version": "4.40.0",
}

PREPROCESSOR: dict[str, Any] = {
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": 0.5,
    "image_processor_type": "FuyuImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "padding_mode": "constant",
    "padding_value": 1.0,
    "patch_size": {"height": 30, "width": 30},
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 60, "width": 90},
    "processor_class": "FuyuProcessor",
}

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% elif message.role == 'assistant' %}"
    "{% generation %}{{ message.content ~ eos_token }}{% endgeneration %}{% else %}"
    "{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


# ------------------------------------------------------------------ tokenizers


def byte_level(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    backend.save(str(folder / "tokenizer.json"))
    token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(i): {"content": name, "special": True, **token} for i, name in enumerate(special)
        },
        "additional_special_tokens": ["<extra>"],
        "bos_token": {"__type": "AddedToken", "content": "<s>", **token},
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "image_token": "<image>",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 1000000000000000019884624838656,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "truncation_side": "right",
        "split_special_tokens": False,
        "sp_model_kwargs": {},
        "tokenizer_class": "PreTrainedTokenizerFast",
        "use_default_system_prompt": False,
    }
    write_json(folder / "tokenizer_config.json", config)


def older_files(folder: Path) -> None:
    """`byte_level` with special_tokens_map.json and added_tokens.json instead of the newer fields."""
    byte_level(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"], config["additional_special_tokens"]
    config |= {"extra_special_tokens": {"audio_token": "<audio>"}, "tokenizer_class": "GPT2Tokenizer"}
    config["chat_template"] = [{"name": "default", "template": TEMPLATE}, {"name": "rag", "template": "x"}]
    write_json(folder / "tokenizer_config.json", config)
    token = {"content": "<s>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {
        "bos_token": token,
        "eos_token": "</s>",
        "additional_special_tokens": ["<a>", {**token, "content": "<b>"}],
    }
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "added_tokens.json", {"<a>": 290, "<b>": 291})


def llama(folder: Path) -> None:
    """A tokenizer.json converted from SentencePiece, with the charsmap of a trained model."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{b:02X}>", -1.0) for b in range(256))]
    pieces += [(f"▁{word}", -2.0 - i) for i, word in enumerate(dict.fromkeys(WORDS))]
    backend = Tokenizer(models.Unigram(pieces, 0, True))
    steps: list[Any] = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    if charsmap := trained_charsmap():
        steps.insert(0, normalizers.Precompiled(charsmap))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": True,
        "legacy": False,
    }
    write_json(
        folder / "tokenizer_config.json",
        {**config, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    )


def mpnet(folder: Path) -> None:
    """A WordPiece vocab.txt."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "[UNK]", *dict.fromkeys(WORDS), "##s", "##ing", "<mask>"]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    config = {"tokenizer_class": "MPNetTokenizer", "do_lower_case": True, "strip_accents": None}
    write_json(folder / "tokenizer_config.json", {**config, "tokenize_chinese_chars": True})


def gpt2(folder: Path) -> None:
    """vocab.json and merges.txt."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("o", "g")]
    tokens = ["<|endoftext|>", *letters, *("".join(pair) for pair in pairs)]
    write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, pairs)) + "\n")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "errors": "replace"})


def tekken(folder: Path) -> None:
    """tekken.json."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", b"aa", b"aaa"]
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate([*tokens, b"not used"])
    ]
    special = [
        {"rank": rank, "token_str": name, "is_control": True}
        for rank, name in enumerate(("<unk>", "<s>", "</s>"))
    ]
    config = {
        "pattern": r"[A-Za-z]+| ?[^ \nA-Za-z]+|[ \n]+",
        "version": "v3",
        "num_vocab_tokens": len(tokens),
        "default_vocab_size": 20 + len(tokens),
        "default_num_special_tokens": 20,
    }
    write_json(
        folder / "tekken.json",
        {"config": config, "vocab": vocab, "special_tokens": special, "type": "Tekken"},
    )
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})


def trained_charsmap() -> bytes:
    """The charsmap of SentencePiece's default normaliser; empty without the package."""
    from monoblock.tokenization.protobuf import read_model

    if (raw := trained_model()) is None:
        return b""
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "tokenizer.model"
        path.write_bytes(raw)
        return read_model(path).charsmap


def trained_model() -> bytes | None:
    """A small Unigram model trained by SentencePiece; None without the package."""
    try:
        import sentencepiece
    except ImportError:
        return None
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 20),
        model_writer=out,
        vocab_size=60,
        byte_fallback=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return out.getvalue()


def sentencepiece_model(kind: int) -> bytes:
    """A hand-encoded tokenizer.model; `kind`: 1 Unigram, 2 BPE, 3 words."""
    pieces: list[tuple[str, float, int]] = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)] if kind == 2 else []
    words = [f"▁{word}" for word in dict.fromkeys(WORDS)]
    if kind == 2:
        words += sorted({word[:end] for word in words for end in range(1, len(word))} | set("".join(words)))
    pieces += [(word, -1.0 - i, 1) for i, word in enumerate(dict.fromkeys(words))]
    pieces += [("<user>", 0.0, 4)] if kind == 2 else []
    rows = b"".join(
        field(1, field(1, p.encode()) + field(2, s) + (field(3, t) if t != 1 else b"")) for p, s, t in pieces
    )
    trainer = field(3, kind) + field(40, 0) + (field(35, 1) if kind == 2 else b"")
    return rows + field(2, trainer) + field(3, field(3, 1) + field(4, 0) + field(5, 1))


def sentencepiece(folder: Path, kind: int) -> None:
    raw = trained_model() if kind == 0 else None
    (folder / "tokenizer.model").write_bytes(raw or sentencepiece_model(kind or 1))


# ------------------------------------------------------------------ weights

ARRAYS: dict[str, Any] = {
    "embed.weight": np.arange(24, dtype=np.float32).reshape(6, 4),
    "layer.0.weight": np.ones((4, 4), np.float16),
    "layer.0.bias": np.zeros(4, np.float32),
    "count": np.array([1, 2, 3], np.int64),
}


def safetensors(folder: Path) -> None:
    from monoblock.checkpoint.save import save_tensors

    save_tensors(folder, ARRAYS, framework="np", max_shard_size="50GB")


def shards(folder: Path) -> None:
    """Two safetensors files and their index."""
    from monoblock.checkpoint.save import save_tensors

    save_tensors(folder, ARRAYS, framework="np", max_shard_size=100)


def msgpack(folder: Path) -> None:
    from monoblock.checkpoint.msgpack_save import save_msgpack

    leaves = {name.replace(".", "/"): x for name, x in ARRAYS.items() if x.dtype != np.int64}
    save_msgpack(folder, leaves)


def chunked_msgpack(folder: Path) -> None:
    """An array in two chunks, in Flax's format for arrays of over 2^30 bytes."""

    def text(value: str) -> bytes:
        return (
            bytes([0xA0 | len(value)]) + value.encode()
            if len(value) < 32
            else bytes([0xD9, len(value)]) + value.encode()
        )

    def array(values: Any) -> bytes:
        raw = values.tobytes()
        inner = bytes([0x93, 0x90 | values.ndim, *values.shape]) + text(values.dtype.name)
        inner += bytes([0xC4, len(raw)]) + raw
        return bytes([0xC7, len(inner), 1]) + inner

    halves = (np.ones(3, np.float32), np.zeros(5, np.float32))
    chunks = b"\x82" + b"".join(text(str(i)) + array(half) for i, half in enumerate(halves))
    shape = b"\x82" + text("0") + b"\x02" + text("1") + b"\x04"
    node = (
        b"\x83"
        + text("__msgpack_chunked_array__")
        + b"\xc3"
        + text("shape")
        + shape
        + text("chunks")
        + chunks
    )
    other = (
        b"\x82"
        + text("kernel")
        + array(np.ones((2, 2), np.float16))
        + text("bias")
        + array(np.ones(2, np.float32))
    )
    (folder / "flax_model.msgpack").write_bytes(b"\x82" + text("big") + node + text("dense") + other)


def hdf5(folder: Path) -> None:
    import h5py

    with h5py.File(folder / "tf_model.h5", "w") as file:
        for name in ("embeddings", "layer_._0"):
            group = file.create_group(name)
            group.attrs["weight_names"] = [f"model/{name}/kernel:0".encode()]
            group.create_dataset(f"model/{name}/kernel:0", data=np.ones((4, 4), np.float32))
            group.create_dataset(f"model/{name}/bias:0", data=np.zeros(4, np.float32))


def pickled(folder: Path, *, zipped: bool) -> None:
    import torch

    shared = torch.arange(12.0).reshape(3, 4)
    state = {
        "weight": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
        "half": torch.ones(4, dtype=torch.bfloat16),
        "view": shared[1:],
        "row": shared[0],
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "count": torch.tensor([1, 2]),
    }
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)


# ------------------------------------------------------------------ models


def model(folder: Path, model_type: str, quantization: str | None = None) -> None:
    """A complete model folder."""
    fields = CONFIGS[model_type]
    write_json(folder / "config.json", fields)
    config = monoblock.AutoConfig.from_pretrained(folder)
    import torch

    torch.manual_seed(0)
    instance = getattr(monoblock, fields["architectures"][0])(config)
    if quantization is not None:
        instance = instance.to(torch.bfloat16)
        instance.quantize(quantization)
    instance.save_pretrained(folder)
    if quantization is None:
        write_json(folder / "config.json", {**fields, "torch_dtype": "float32"})


def gguf(folder: Path) -> None:
    """GGUF files with tensors of several types and a tokenizer of either kind."""
    import gguf_files

    letters = [chr(code) for code in range(97, 123)]
    both = ["ab", "bc", "abc"]

    def sentencepiece(writer: Any) -> None:
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *both]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
        writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template("{{ messages }}")

    def byte_level(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("mpt")
        writer.add_token_list([*letters, *both, "<eos>"])
        writer.add_token_types([1] * (len(letters) + 3) + [3])
        writer.add_token_merges(["a b", "b c", "a bc"])
        writer.add_eos_token_id(len(letters) + 3)

    kinds = {"attn_v": "Q6_K", "ffn_up": "Q4_0", "ffn_gate": "Q5_1", "ffn_down": "Q3_K", "token_embd": "F16"}

    def kind(name: str) -> str:
        return kinds.get(name.split(".")[-2], "Q4_K")

    gguf_files.write(folder / "mistral.gguf", kind, tokenizer=sentencepiece)
    gguf_files.write(folder / "mpt.gguf", kind, architecture="mpt", tokenizer=byte_level)


def packed_by(tool: str, folder: Path) -> None:
    """A model that GPTQ or AWQ quantised."""
    import torch
    from packed_files import Packed
    from safetensors.torch import load_file, save_file

    model(folder, "mistral")
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj.weight" in name]:
        outputs, inputs = tensors[name].shape
        if inputs % 8 or outputs % 8:
            continue
        del tensors[name]
        made = Packed(tool, outputs, inputs, group=-1)
        stem = name.removesuffix("weight")
        tensors |= {stem + end: tensor for end, tensor in made.tensors.items()}
    assert any(name.endswith("qweight") for name in tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    how: dict[str, Any] = {"quant_method": tool, "bits": 4, "group_size": -1}
    how |= {"zero_point": True, "version": "gemm"} if tool == "awq" else {"checkpoint_format": "gptq"}
    content = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", content | {"quantization_config": how})
    assert torch.is_tensor(tensors["lm_head.weight"])


def mistral_release(folder: Path) -> None:
    """Mistral's format: params.json and consolidated.safetensors."""
    params = {
        "dim": 24,
        "n_layers": 1,
        "head_dim": 6,
        "hidden_dim": 20,
        "n_heads": 4,
        "n_kv_heads": 2,
        "norm_eps": 1e-5,
        "vocab_size": 40,
        "rope_theta": 5000.0,
        "sliding_window": 7,
        "max_batch_size": 4,
    }
    write_json(folder / "params.json", params)
    layer = "layers.0."
    shapes = {
        "tok_embeddings.weight": (40, 24),
        "norm.weight": (24,),
        layer + "attention.wq.weight": (24, 24),
        layer + "attention.wk.weight": (12, 24),
        layer + "attention.wv.weight": (12, 24),
        layer + "attention.wo.weight": (24, 24),
        layer + "feed_forward.w1.weight": (20, 24),
        layer + "feed_forward.w2.weight": (24, 20),
        layer + "feed_forward.w3.weight": (20, 24),
        layer + "attention_norm.weight": (24,),
        layer + "ffn_norm.weight": (24,),
        "output.weight": (40, 24),
    }
    from monoblock.checkpoint.save import save_tensors

    arrays = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    (path,) = save_tensors(folder, arrays, framework="np", max_shard_size="1GB")
    path.rename(folder / "consolidated.safetensors")


def openai_release(folder: Path) -> None:
    """OpenAI's format: params_shapes.json and params_0.npy to params_9.npy."""
    width = 64
    layer = [[1, width, 3 * width], [3 * width], [1, width, width], [width], [width], [width]]
    layer += [[1, width, 4 * width], [4 * width], [1, 4 * width, width], [width], [width], [width]]
    shapes = [[16, width], [40, width], *layer]
    write_json(folder / "params_shapes.json", shapes)
    count = sum(int(np.prod(shape)) for shape in shapes)
    for i in range(10):
        size = count * (i + 1) // 10 - count * i // 10
        np.save(folder / f"params_{i}.npy", np.ones(size, np.float32))
