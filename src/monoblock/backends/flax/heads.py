"""Every head kind and its loss, once. Shape suffixes: b batch, s tokens, w width, v outputs.

Models give logits; losses are functions of logits and labels, to be differentiated by whoever trains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from monoblock.backends.flax.model import make_linear, make_norm
from monoblock.backends.xla.inputs import Wanted
from monoblock.heads import KINDS, HeadSpec
from monoblock.spec import ArchSpec

IGNORED = -100
Count = Array | int | None


class Head(nn.Module):
    """Dropout, a dense layer where the kind has one, and a projection; a tied one's matrix is the embedding's."""

    spec: ArchSpec
    head: HeadSpec
    dtype: Any = jnp.float32

    def setup(self) -> None:
        spec, head, kind = self.spec, self.head, KINDS[self.head.kind]
        self.vocabulary = kind.size == "vocab"
        self.tied = self.vocabulary and spec.tie_head
        self.dropout = nn.Dropout(head.dropout)
        if kind.dense:
            self.dense = make_linear(spec, spec.width, True, self.dtype)
        if head.norm:
            self.norm = make_norm(head.norm, self.dtype)
        size = head.size(spec.vocab)
        if size is not None:
            self.out = Projection(spec, size, kind.bias, not self.tied, self.dtype)
        if head.summary and head.summary.size is not None:
            self.summary = make_linear(spec, head.summary.size, True, self.dtype)

    def __call__(self, hidden: Array, table: Array, wanted: Wanted) -> Array:
        """Logits (..., v) of hidden states (..., w); those over the vocabulary are scaled and capped as the spec says.
        Without a projection, the dense layer's output. `table`: the embedding (vocab, w)."""
        kind, rest = KINDS[self.head.kind], not wanted.train
        if kind.dense:
            hidden = self.dropout(hidden, deterministic=rest) if kind.drop_in else hidden
            hidden = _DENSE_ACT[kind.dense](self.dense(hidden))
            hidden = self.norm(hidden) if self.head.norm else hidden
        if kind.size is None:
            return hidden
        logits = self.out(self.dropout(hidden, deterministic=rest), table if self.tied else None)
        if self.vocabulary and self.spec.logit_scale != 1.0:
            logits = logits * self.spec.logit_scale
        if self.vocabulary and (cap := self.spec.logit_softcap) is not None:
            logits = cap * jnp.tanh(logits / cap)
        return logits

    def summarised(self, hidden_bsw: Array, places: Array | None, wanted: Wanted) -> Array:
        """One vector a row, (b, labels) or (b, w): of the place asked for (the last one by default), projected."""
        summary = self.head.summary
        assert summary is not None
        if summary.pool == "mean":
            x = hidden_bsw.mean(axis=1)
        elif summary.pool == "cls_index" and places is not None:
            x = _at(hidden_bsw, places.reshape(-1))
        else:
            x = hidden_bsw[:, 0 if summary.pool == "first" else -1]
        x = self.dropped(x, summary.dropout_in, wanted)
        x = self.summary(x) if summary.size is not None else x
        x = jnp.tanh(x) if summary.tanh else x
        return self.dropped(x, summary.dropout_out, wanted)

    def dropped(self, x: Array, p: float, wanted: Wanted) -> Array:
        """Dropout of that probability while training."""
        if not (p and wanted.train):
            return x
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - p, x.shape)
        return jnp.where(kept, x / (1 - p), 0.0)


class Projection(nn.Module):
    """A dense layer; without a kernel of its own it takes the embedding's matrix (outputs, inputs)."""

    spec: ArchSpec
    size: int
    bias: bool
    own: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, table: Array | None) -> Array:
        bias = self.param("bias", nn.initializers.zeros, (self.size,)) if self.bias else None
        if self.own:
            init = nn.initializers.normal(self.spec.init_std)
            kernel = self.param("kernel", init, (x.shape[-1], self.size))
            logits = jnp.matmul(x.astype(self.dtype), kernel.astype(self.dtype))
        else:
            assert table is not None
            logits = jnp.einsum("...w,vw->...v", x.astype(self.dtype), table.astype(self.dtype))
        return logits if bias is None else logits + bias.astype(self.dtype)


_DENSE_ACT: dict[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


def _at(hidden_bsw: Array, places_b: Array) -> Array:
    return jnp.take_along_axis(hidden_bsw, places_b[:, None, None], axis=1)[:, 0]


def last_tokens(
    hidden_bsw: Array, input_ids: Array | None, attention_mask: Array | None, pad_id: int | None
) -> Array:
    """The hidden state (b, w) of each row's last token that is not padding.

    An attention mask tells padding from a real token of the same id; without one the pad id does. With neither,
    or with embeddings as input, it is the last place.
    """
    s = hidden_bsw.shape[1]
    if attention_mask is not None:
        real = attention_mask[:, :s] != 0
    elif input_ids is not None and pad_id is not None:
        real = input_ids != pad_id
    else:
        return hidden_bsw[:, -1]
    return _at(hidden_bsw, (jnp.arange(s) * real).argmax(-1))


# ---------------------------------------------------------------------------- outputs


def outputs(
    head: Head, hidden_bsw: Array, table: Array, given: Mapping[str, Any], wanted: Wanted
) -> dict[str, Any]:
    """What the head computes, by the names of its kind's output."""
    return _OUTPUTS[head.head.kind](head, hidden_bsw, table, given, wanted)


def _vocabulary(
    head: Head, hidden: Array, table: Array, _: Mapping[str, Any], wanted: Wanted
) -> dict[str, Any]:
    return {"logits": head(hidden[:, -wanted.keep :], table, wanted)}


def _every(head: Head, hidden: Array, table: Array, _: Mapping[str, Any], wanted: Wanted) -> dict[str, Any]:
    return {"logits": head(hidden, table, wanted)}


def _sequence(
    head: Head, hidden: Array, table: Array, given: Mapping[str, Any], wanted: Wanted
) -> dict[str, Any]:
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if head.head.pad_id is None and hidden.shape[0] > 1:
        raise ValueError(
            "Cannot handle batch sizes > 1 if no padding token is defined: set model.config.pad_token_id"
        )
    return {"logits": head(last_tokens(hidden, ids, mask, head.head.pad_id), table, wanted)}


def _first(head: Head, hidden: Array, table: Array, _: Mapping[str, Any], wanted: Wanted) -> dict[str, Any]:
    return {"logits": head(hidden[:, 0], table, wanted)}


def _pooler(head: Head, hidden: Array, table: Array, _: Mapping[str, Any], wanted: Wanted) -> dict[str, Any]:
    return {"last_hidden_state": hidden, "pooler_output": head(hidden[:, 0], table, wanted)}


def _choice(head: Head, hidden: Array, table: Array, _: Mapping[str, Any], wanted: Wanted) -> dict[str, Any]:
    return {"logits": head(hidden[:, 0], table, wanted).reshape(-1, wanted.choices)}


def _double(
    head: Head, hidden: Array, table: Array, given: Mapping[str, Any], wanted: Wanted
) -> dict[str, Any]:
    """Language model and multiple choice over hidden states of (batch * choices, s, w)."""
    logits = head(hidden, table, wanted)
    scores = head.summarised(hidden, given.get("mc_token_ids"), wanted)
    if wanted.nested:
        logits, scores = (x.reshape(-1, wanted.choices, *x.shape[1:]) for x in (logits, scores))
    return {"logits": logits, "mc_logits": scores.squeeze(-1) if scores.shape[-1] == 1 else scores}


def _span(head: Head, hidden: Array, table: Array, _: Mapping[str, Any], wanted: Wanted) -> dict[str, Any]:
    logits = head(hidden, table, wanted)
    return {"start_logits": logits[..., 0], "end_logits": logits[..., 1]}


_OUTPUTS = {
    "causal": _vocabulary,
    "masked": _every,
    "double": _double,
    "sequence": _sequence,
    "first": _first,
    "choice": _choice,
    "pooler": _pooler,
    "token": _every,
    "span": _span,
}

# ---------------------------------------------------------------------------- losses


def cross_entropy(logits: Array, labels: Array, count: Count = None) -> Array:
    """Mean over the labels that are not -100, or their sum over `count` (for accumulated gradients). Without any
    label the loss is 0, with a zero gradient."""
    logits, labels = logits.reshape(-1, logits.shape[-1]).astype(jnp.float32), labels.reshape(-1)
    real = labels != IGNORED
    chosen = jnp.take_along_axis(logits, jnp.where(real, labels, 0)[:, None], axis=-1)[:, 0]
    total = jnp.where(real, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0).sum()
    return total / (jnp.maximum(real.sum(), 1) if count is None else count)


def causal_loss(logits_bsv: Array, labels_bs: Array, count: Count = None) -> Array:
    """Each token predicts the next one: labels are the input ids, shifted here."""
    if logits_bsv.shape[1] != labels_bs.shape[1]:
        raise ValueError(
            f"labels of {labels_bs.shape[1]} tokens came with logits of {logits_bsv.shape[1]}: "
            "leave logits_to_keep at 0 when labels are given"
        )
    return cross_entropy(logits_bsv[:, :-1], labels_bs[:, 1:], count)


def sequence_loss(logits_bv: Array, labels: Array, problem_type: str | None, count: Count = None) -> Array:
    """Regression (mean square), one class (cross-entropy) or several (binary cross-entropy); the type is inferred
    from the labels of this call when None is given."""
    if problem_type is None:
        whole = not jnp.issubdtype(labels.dtype, jnp.floating)
        problem_type = "single_label_classification" if whole else "multi_label_classification"
        if logits_bv.shape[-1] == 1:
            problem_type = "regression"
    if problem_type == "single_label_classification":
        return cross_entropy(logits_bv, labels, count)
    logits_bv = logits_bv.astype(jnp.float32)
    labels = labels.astype(jnp.float32).reshape(logits_bv.shape)
    if problem_type == "regression":
        losses = jnp.square(logits_bv - labels)
    else:
        losses = jax.nn.softplus(logits_bv) - logits_bv * labels
    return losses.mean() if count is None else losses.sum() / (count * logits_bv.shape[-1])


def span_loss(start_bs: Array, end_bs: Array, starts: Array, ends: Array, count: Count = None) -> Array:
    """The mean of two cross-entropies over the tokens; positions outside the text are ignored."""
    length = start_bs.shape[1]

    def one(logits: Array, positions: Array) -> Array:
        positions = positions.reshape(-1)
        outside = (positions < 0) | (positions >= length)
        return cross_entropy(logits, jnp.where(outside, IGNORED, positions), count)

    return (one(start_bs, starts) + one(end_bs, ends)) / 2


def losses(head: HeadSpec, found: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Array]:
    """The losses of a head's outputs by the labels that are given: `loss`, and `mc_loss` of a double head.

    `given`: labels (batch, tokens), (batch,) or (batch, labels) as the kind has them; start_positions, end_positions;
    mc_labels; num_items_in_batch. ValueError if none came that this head has.
    """
    count, made = given.get("num_items_in_batch"), {}
    labels = {n: given[n] for n in KINDS[head.kind].labels if given.get(n) is not None}
    if not labels or (head.kind == "span" and len(labels) < 2):
        wanted = " and ".join(KINDS[head.kind].labels) or "no labels"
        raise ValueError(f"a loss of this head takes {wanted}, got {', '.join(given) or 'none'}")
    if head.kind == "span":
        starts, ends = labels["start_positions"], labels["end_positions"]
        return {"loss": span_loss(found["start_logits"], found["end_logits"], starts, ends, count)}
    if "labels" in labels:
        made["loss"] = _LOSSES[head.kind](head, found["logits"], labels["labels"], count)
    if "mc_labels" in labels:
        made["mc_loss"] = cross_entropy(found["mc_logits"], labels["mc_labels"], count)
    return made


def _shifted(_: HeadSpec, logits: Array, labels: Array, count: Count) -> Array:
    rows = (-1, labels.shape[-1])
    return causal_loss(logits.reshape(*rows, logits.shape[-1]), labels.reshape(rows), count)


def _classified(head: HeadSpec, logits: Array, labels: Array, count: Count) -> Array:
    return sequence_loss(logits, labels, head.problem_type, count)


def _plain(_: HeadSpec, logits: Array, labels: Array, count: Count) -> Array:
    return cross_entropy(logits, labels, count)


_LOSSES = {
    "causal": _shifted,
    "double": _shifted,
    "masked": _plain,
    "token": _plain,
    "choice": _plain,
    "sequence": _classified,
    "first": _classified,
}
