"""Logits processors and the generation loop against transformers: scores, and tokens for the same model and seed."""

import copy
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from monoblock.backends.pytorch.arrays import TorchOps  # noqa: E402
from monoblock.generation import loop, processors  # noqa: E402
from monoblock.generation.config import GenerationConfig  # noqa: E402

VOCAB = 611  # more than scores.WINDOW, so that both paths of top_p run
PROMPT = 7
PAD, EOS = 3, [5, 11]
ATOL = 1e-6  # the same float32 kernels in nearly the same order; scores are of size 5


@pytest.fixture(scope="module")
def peer():
    torch.manual_seed(0)
    config = transformers.MptConfig(
        d_model=32, n_heads=4, n_layers=2, vocab_size=VOCAB, max_seq_len=128, use_cache=False
    )
    model = transformers.MptForCausalLM(config).eval()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(40)  # logits spread so far that greedy ties cannot happen
    model.generation_config = transformers.GenerationConfig()
    return model


def peers_processors(peer, fields, ids, mask, allowed=None):
    config, _ = peer._prepare_generation_config(transformers.GenerationConfig(**fields))
    peer._prepare_special_tokens(config, True, device="cpu", batch_size=len(ids))
    config.max_length = PROMPT + 4
    return peer._get_logits_processor(
        config,
        input_ids_seq_length=PROMPT,
        encoder_input_ids=ids[:, :PROMPT],
        prefix_allowed_tokens_fn=allowed,
        device="cpu",
        model_kwargs={"attention_mask": mask},
    )


def our_processors(fields, ids, mask, allowed=None):
    from monoblock.generation.resolve import resolve

    setting = processors.ProcessorContext(
        ops=TorchOps(),
        config=resolve(fields, None, None),
        prompt_bn=ids[:, :PROMPT],
        valid_bn=None if mask is None or bool(mask.all()) else mask != 0,
        prompt_length=PROMPT,
        max_length=PROMPT + 4,
    )
    return processors.build(setting, processors.wanted(setting.config, allowed))


def scores(seed, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((3, VOCAB), generator=generator) * spread


def token_ids(seed, length, vocab=20):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(20, 20 + vocab, (3, length), generator=generator)


SAMPLED = [
    {"temperature": 0.7},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 5000},
    {"top_p": 0.0},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"top_p": 0.95, "top_k": 0},
    {"top_p": 0.9, "temperature": 5.0, "top_k": 0},
    {"min_p": 0.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_h": 0.4},
    {"top_h": 1.0},
    {"typical_p": 0.2, "top_k": 0},
    {"typical_p": 0.9},
    {"epsilon_cutoff": 3e-3, "top_k": 0},
    {"eta_cutoff": 2e-3, "top_k": 0},
    {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.02,
        "typical_p": 0.95,
        "renormalize_logits": True,
    },
]
ALWAYS = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"encoder_repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"no_repeat_ngram_size": 30},
    {"encoder_no_repeat_ngram_size": 2},
    {"bad_words_ids": [[4], [21], [22, 23], [21, 22, 23], [5]]},
    {"sequence_bias": [[[21], -2.0], [[22, 23], 1.5], [[24, 23], 2.5], [[25, 26, 27, 28], -1.0]]},
    {"min_length": PROMPT + 3},
    {"min_new_tokens": 2},
    {"forced_eos_token_id": 5},
    {"forced_eos_token_id": [5, 7]},
    {"exponential_decay_length_penalty": (1, 1.4)},
    {"suppress_tokens": [0, 21, 22]},
    {"begin_suppress_tokens": [1, 2]},
    {"renormalize_logits": True},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "bad_words_ids": [[9]], "min_new_tokens": 3},
]


@pytest.mark.parametrize("fields", SAMPLED, ids=str)
@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_sampling_processors(peer, fields, spread):
    fields = {"do_sample": True, **fields}
    ids, x = token_ids(1, PROMPT), scores(2, spread)
    expected = peers_processors(peer, fields, ids, None)(ids, x.clone())
    got = run(our_processors(fields, ids, None), ids, x)
    torch.testing.assert_close(got, expected, atol=ATOL, rtol=1e-6)


@pytest.mark.parametrize("fields", ALWAYS, ids=str)
@pytest.mark.parametrize("new", [0, 1, 2, 3])
def test_other_processors(peer, fields, new):
    fields = {"eos_token_id": EOS, "pad_token_id": PAD, **fields}
    ids = token_ids(new, PROMPT + new, vocab=4)  # few distinct ids, so that n-grams repeat
    mask = torch.ones_like(ids[:, :PROMPT])
    x = scores(new)
    expected = peers_processors(peer, fields, ids, mask)(ids, x.clone())
    got = run(our_processors(fields, ids, mask), ids, x)
    torch.testing.assert_close(got, expected, atol=ATOL, rtol=1e-6)


def test_repetition_penalty_ignores_left_padding(peer):
    ids, x = token_ids(1, PROMPT), scores(2)
    mask = torch.tensor([[1] * 7, [0] * 2 + [1] * 5, [0] * 6 + [1]])
    ids[mask == 0] = PAD
    fields = {"repetition_penalty": 1.5, "pad_token_id": PAD}
    expected = peers_processors(peer, fields, ids, mask)(ids, x.clone())
    torch.testing.assert_close(run(our_processors(fields, ids, mask), ids, x), expected, atol=ATOL, rtol=0)
    assert (run(our_processors(fields, ids, mask), ids, x)[:, PAD] == x[:, PAD]).all()


def test_prefix_function_whose_tokens_are_all_masked(peer):
    ids, x = token_ids(1, PROMPT), scores(2)
    x[1, [30, 31]] = -torch.inf

    def allowed(prompt, row):
        assert row.shape == (PROMPT,)
        return [[5], [30, 31], [1, 2, 3]][prompt]

    expected = peers_processors(peer, {}, ids, None, allowed)(ids, x.clone())
    torch.testing.assert_close(run(our_processors({}, ids, None, allowed), ids, x), expected)


def test_forced_bos_and_invalid_values(peer):
    x = scores(3)
    x[0, 1], x[0, 2], x[1, 3] = torch.nan, torch.inf, -torch.inf
    ids = token_ids(1, PROMPT)
    fields = {"remove_invalid_values": True}
    torch.testing.assert_close(
        run(our_processors(fields, ids, None), ids, x),
        peers_processors(peer, fields, ids, None)(ids, x.clone()),
    )
    fields = {"forced_bos_token_id": 9}
    one = ids[:, :1]
    torch.testing.assert_close(
        run(our_processors(fields, ids, None), one, x),
        peers_processors(peer, fields, ids, None)(one, x.clone()),
    )


def run(chain, ids, x):
    for processor in chain:
        before = x.clone()
        after = processor(ids, x)
        torch.testing.assert_close(x, before, equal_nan=True)  # the input is not modified
        x = after
    return x


# ---------------------------------------------------------------------- the loop on a transformers model


class Recomputing:
    """A decoder that runs a transformers model over the whole sequence at each step."""

    past_key_values = None

    def __init__(self, model, config):
        self.model, self.config = model, config

    def prefill(self, ids, mask):
        self.ids, self.mask = ids, torch.ones_like(ids) if mask is None else mask
        return self.scores()

    def step(self, ids):
        self.ids = torch.cat([self.ids, ids], 1)
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], 1)
        return self.scores()

    def reorder(self, rows):
        self.ids, self.mask = self.ids[rows], self.mask[rows]

    def scores(self):
        wanted = {"output_attentions": True, "output_hidden_states": True}
        out = self.model(self.ids, attention_mask=self.mask, use_cache=False, **wanted)
        self.attentions, self.hidden_states = out.attentions, out.hidden_states
        return out.logits[:, -1].float()


def ours(peer, ids, **arguments):
    model = SimpleNamespace(
        ops=TorchOps(),
        generation_config=None,
        unsupported={},
        input_names=frozenset(),
        max_positions=None,
        compiled=None,
        vocab=VOCAB,
        decoder=lambda plan, inputs: Recomputing(peer, plan.config),
    )
    with torch.no_grad():
        return loop.generate(model, ids, **arguments)


CALLS = [
    {"max_new_tokens": 12},
    {"max_length": 13},
    {"max_new_tokens": 12, "eos_token_id": list(range(100)), "pad_token_id": 0},
    {"max_new_tokens": 12, "eos_token_id": list(range(0, VOCAB, 2)), "pad_token_id": 1, "min_new_tokens": 4},
    {"max_new_tokens": 12, "repetition_penalty": 1.8, "no_repeat_ngram_size": 2},
    {"max_new_tokens": 12, "bad_words_ids": [[i] for i in range(200)], "forced_eos_token_id": 7},
    {"max_new_tokens": 12, "do_sample": True},
    {"max_new_tokens": 12, "do_sample": True, "temperature": 3.0, "top_k": 0, "top_p": 0.8},
    {
        "max_new_tokens": 12,
        "do_sample": True,
        "min_p": 0.2,
        "num_return_sequences": 3,
        "eos_token_id": [7, 8],
    },
]


@pytest.mark.parametrize("arguments", CALLS, ids=lambda call: "-".join(call))
@pytest.mark.parametrize("padded", [False, True])
def test_generate_equals_transformers_token_for_token(peer, arguments, padded):
    ids = token_ids(4, PROMPT, vocab=300)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3], mask[2, :6] = 0, 0
        ids[mask == 0] = PAD
    arguments = {"pad_token_id": PAD, **arguments}
    torch.manual_seed(5)
    expected = peer.generate(ids, attention_mask=mask, **copy.deepcopy(arguments), use_cache=False)
    torch.manual_seed(5)
    got = ours(peer, ids, attention_mask=mask, **arguments)
    assert got.tolist() == expected.tolist()


def test_dict_output(peer):
    ids = token_ids(4, PROMPT, vocab=300)
    arguments = {
        "max_new_tokens": 4,
        "do_sample": True,
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_attentions": True,
        "output_hidden_states": True,
    }
    torch.manual_seed(1)
    expected = peer.generate(ids, **arguments, use_cache=False, pad_token_id=PAD)
    torch.manual_seed(1)
    got = ours(peer, ids, **arguments, pad_token_id=PAD)
    assert got.sequences.tolist() == expected.sequences.tolist()
    for name in ("scores", "logits"):
        for mine, theirs in zip(getattr(got, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-5)  # logits are of size 100
    assert got.scores[0].shape == (6, VOCAB)
    for name in ("attentions", "hidden_states"):
        for mine, theirs in zip(getattr(got, name), getattr(expected, name), strict=True):
            assert [layer.shape[0] for layer in mine] == [6] * len(theirs)
            for layer, their_layer in zip(mine, theirs, strict=True):
                torch.testing.assert_close(
                    layer, their_layer, atol=1e-3, rtol=1e-5
                )  # states are of size 1000


# ---------------------------------------------------------------------- files


def test_generation_config_round_trip(tmp_path):
    fields = {
        "max_new_tokens": 9,
        "eos_token_id": [0, 50278],
        "temperature": 0.5,
        "do_sample": True,
        "suppress_tokens": [1, 2],
        "sequence_bias": {(1, 2): -1.5, (3,): 2.0},
    }
    GenerationConfig(**fields).save_pretrained(tmp_path)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.temperature, theirs.max_new_tokens) == ([0, 50278], 0.5, 9)
    theirs.save_pretrained(tmp_path)
    back = GenerationConfig.from_pretrained(tmp_path)
    assert back.sequence_bias == [[[1, 2], -1.5], [[3], 2.0]]
    assert back.transformers_version == transformers.__version__
    assert {k: v for k, v in back.set_fields().items() if k != "sequence_bias"} == {
        k: v for k, v in fields.items() if k != "sequence_bias"
    }


def test_generation_config_has_the_fields_of_transformers():
    theirs = {
        name for name in vars(transformers.GenerationConfig()) if name not in ("transformers_version",)
    } - {"_from_model_config"}
    theirs = {name for name in theirs if not name.startswith("_")}
    assert theirs <= GenerationConfig.FIELDS
    assert theirs >= GenerationConfig.FIELDS
