"""All head kinds and their losses. Shape suffixes: b batch, s tokens, w width, v outputs.

Models return logits; losses are separate, differentiable functions of logits and labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from monoblock.backends.flax.layers import projection
from monoblock.backends.flax.namespace import XP
from monoblock.backends.flax.parts import Part, computes, dropout
from monoblock.backends.xla.checked import describe_labels
from monoblock.backends.xla.inputs import ForwardOptions
from monoblock.call_checks import (
    IGNORED,
    check_classes,
    check_token_positions,
    check_tokens_have_labels,
    problem_of,
)
from monoblock.heads import KINDS, HeadSpec

Count = Array | int | None


@computes("pooler")
class Pooler(Part):
    """(b, w): dense layer and tanh on the first token's hidden state."""

    def __call__(self, hidden_bsw: Array) -> Array:
        return jnp.tanh(self.role("head_dense")(hidden_bsw[:, 0]))


@computes("lm_head")
class LMHead(Part):
    """Dense layer, GELU, norm, and the projection to the vocabulary, whose bias belongs to this module."""

    def setup(self) -> None:
        super().setup()
        assert self.head_spec is not None
        self.bias = self.param("bias", nn.initializers.zeros, (self.head_spec.size(self.spec.vocab),))

    @nn.nowrap
    def make(self, child: Any) -> nn.Module | None:
        """Create a submodule."""
        if child == "head_out" and self.head_spec is not None:
            return projection(self.spec, self.head_spec, bias=False, dtype=self.dtype)
        return super().make(child)

    def __call__(self, hidden: Array, table: Array) -> Array:
        x = jax.nn.gelu(self.role("head_dense")(hidden), approximate=False)
        return self.role("head_out")(self.role("head_norm")(x), table) + self.bias.astype(self.dtype)


@computes("classifier_head")
class ClassifierHead(Part):
    """Dense layer and tanh on the first token's hidden state, then the projection; dropout before both."""

    def __call__(self, hidden_bsw: Array, train: bool) -> Array:
        assert self.head_spec is not None
        p = self.head_spec.dropout
        x = jnp.tanh(self.role("head_dense")(dropout(self, hidden_bsw[:, 0], p, train)))
        return self.role("head_out")(dropout(self, x, p, train))


@computes("summary")
class SummaryHead(Part):
    """(b, labels) or (b, w): the projected hidden state of one position per row, by default the last."""

    def __call__(self, hidden_bsw: Array, positions: Array | None, train: bool) -> Array:
        assert self.head_spec is not None and self.head_spec.summary is not None
        summary = self.head_spec.summary
        if summary.pool == "mean":
            x = hidden_bsw.mean(axis=1)
        elif summary.pool == "cls_index" and positions is not None:
            x = _at(hidden_bsw, positions.reshape(-1))
        else:
            x = hidden_bsw[:, 0 if summary.pool == "first" else -1]
        x = dropout(self, x, summary.dropout_in, train)
        x = self.role("head_summary")(x) if self.has("head_summary") else x
        x = jnp.tanh(x) if summary.tanh else x
        return dropout(self, x, summary.dropout_out, train)


def _at(hidden_bsw: Array, positions_b: Array) -> Array:
    return jnp.take_along_axis(hidden_bsw, positions_b[:, None, None], axis=1)[:, 0]


def last_tokens(
    hidden_bsw: Array, input_ids: Array | None, attention_mask: Array | None, head: HeadSpec
) -> Array:
    """The hidden state (b, w) of each row's last token.

    It is the last unmasked token that is not the pad token; a row of pad tokens ends where its mask does. With
    `head.last_by` set to the mask, only the mask decides, which distinguishes padding from real tokens of the pad id;
    the same holds for embeddings. Without mask and ids, it is the last position.
    """
    s = hidden_bsw.shape[1]
    not_pad = None if input_ids is None or head.pad_id is None else input_ids != head.pad_id
    kept = None if attention_mask is None else attention_mask[:, :s] != 0
    if (real := not_pad if kept is None else kept) is None:
        return hidden_bsw[:, -1]
    rank = jnp.arange(1, s + 1) * real
    if kept is not None and not_pad is not None and head.last_by == "pad_id":
        rank = rank + s * (kept & not_pad)
    return _at(hidden_bsw, rank.argmax(-1))


# ---------------------------------------------------------------------------- outputs


def logits(network: Any, hidden: Array, options: ForwardOptions) -> Array:
    """Logits (..., v) of hidden states (..., w); vocabulary logits are scaled and soft-capped as in the spec."""
    spec, head = network.spec, network.head_spec
    table = network.at("embed").embedding  # for a tied head
    if network.has("lm_head"):
        scores = network.role("lm_head")(hidden, table)
    elif network.has("classifier_head"):
        scores = network.role("classifier_head")(hidden, options.train)
    else:
        hidden = network.dropped(hidden, "head_drop", head.dropout, options.train)
        scores = network.role("head_out")(hidden, table)
    if KINDS[head.kind].size != "vocab":
        return scores
    if spec.logit_scale != 1.0:
        scores = scores * spec.logit_scale
    cap = spec.logit_softcap
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def outputs(
    network: Any, hidden_bsw: Array, given: Mapping[str, Any], options: ForwardOptions
) -> dict[str, Any]:
    """The outputs of the head by name."""
    return _OUTPUTS[network.head_spec.kind](network, hidden_bsw, given, options)


def _vocabulary(network: Any, hidden: Array, _: Mapping[str, Any], options: ForwardOptions) -> dict[str, Any]:
    return {"logits": logits(network, hidden[:, -options.keep :], options)}


def _every(network: Any, hidden: Array, _: Mapping[str, Any], options: ForwardOptions) -> dict[str, Any]:
    return {"logits": logits(network, hidden, options)}


def _sequence(
    network: Any, hidden: Array, given: Mapping[str, Any], options: ForwardOptions
) -> dict[str, Any]:
    ids, mask, head = given.get("input_ids"), given.get("attention_mask"), network.head_spec
    if head.pad_id is None and hidden.shape[0] > 1:
        raise ValueError(
            "Cannot handle batch sizes > 1 if no padding token is defined: set model.config.pad_token_id"
        )
    return {"logits": logits(network, last_tokens(hidden, ids, mask, head), options)}


def _pooler(network: Any, hidden: Array, _: Mapping[str, Any], __: ForwardOptions) -> dict[str, Any]:
    return {"last_hidden_state": hidden, "pooler_output": network.role("pooler")(hidden)}


def _choice(network: Any, hidden: Array, _: Mapping[str, Any], options: ForwardOptions) -> dict[str, Any]:
    pooled = network.bare.role("pooler")(hidden)
    return {"logits": logits(network, pooled, options).reshape(-1, options.choices)}


def _double(network: Any, hidden: Array, given: Mapping[str, Any], options: ForwardOptions) -> dict[str, Any]:
    """Language model and multiple choice over hidden states of (batch * choices, s, w)."""
    lm_logits = logits(network, hidden, options)
    scores = network.role("summary")(hidden, given.get("mc_token_ids"), options.train)
    if options.nested:
        lm_logits, scores = (x.reshape(-1, options.choices, *x.shape[1:]) for x in (lm_logits, scores))
    return {"logits": lm_logits, "mc_logits": scores.squeeze(-1) if scores.shape[-1] == 1 else scores}


def _span(network: Any, hidden: Array, _: Mapping[str, Any], options: ForwardOptions) -> dict[str, Any]:
    scores = logits(network, hidden, options)
    return {"start_logits": scores[..., 0], "end_logits": scores[..., 1]}


_OUTPUTS = {
    "causal": _vocabulary,
    "masked": _every,
    "double": _double,
    "sequence": _sequence,
    "first": _every,
    "choice": _choice,
    "pooler": _pooler,
    "token": _every,
    "span": _span,
}

# ---------------------------------------------------------------------------- losses


def cross_entropy(logits: Array, labels: Array, count: Count = None, name: str = "labels") -> Array:
    """The mean cross-entropy over labels other than -100, or their sum / `count` (for accumulated gradients). Without
    labels the loss and its gradient are 0. ValueError if the labels `name` do not match the logits (..., v)."""
    check_classes(describe_labels(XP, name, labels), logits.shape)
    return _cross_entropy(logits, labels, count)


def _cross_entropy(logits: Array, labels: Array, count: Count) -> Array:
    logits, labels = logits.reshape(-1, logits.shape[-1]).astype(jnp.float32), labels.reshape(-1)
    real = labels != IGNORED
    chosen = jnp.take_along_axis(logits, jnp.where(real, labels, 0)[:, None], axis=-1)[:, 0]
    total = jnp.where(real, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0).sum()
    return total / (jnp.maximum(real.sum(), 1) if count is None else count)


def causal_loss(logits_bsv: Array, labels_bs: Array, count: Count = None) -> Array:
    """Next-token cross-entropy: labels are the input ids; the shift is done here."""
    labels = describe_labels(XP, "labels", labels_bs)
    check_tokens_have_labels(labels, logits_bsv.shape)
    if logits_bsv.shape[1] != labels_bs.shape[1]:
        raise ValueError(
            f"labels have {labels_bs.shape[1]} tokens, but logits have {logits_bsv.shape[1]}: "
            "leave logits_to_keep at 0 when labels are given"
        )
    check_classes(labels, logits_bsv.shape)
    return _cross_entropy(logits_bsv[:, :-1], labels_bs[:, 1:], count)


def sequence_loss(logits_bv: Array, labels: Array, problem_type: str | None, count: Count = None) -> Array:
    """Regression (mean squared error), single-label (cross-entropy) or multi-label classification (binary
    cross-entropy); `problem_type` None: inferred from the labels."""
    problem_type = problem_of(describe_labels(XP, "labels", labels), logits_bv.shape, problem_type)
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
    """The mean of the start and end cross-entropies over tokens; positions outside the sequence are ignored."""
    length = start_bs.shape[1]

    def one(logits: Array, positions: Array) -> Array:
        positions = positions.reshape(-1)
        outside = (positions < 0) | (positions >= length)
        return _cross_entropy(logits, jnp.where(outside, IGNORED, positions), count)

    for name, labels in (("start_positions", starts), ("end_positions", ends)):
        check_token_positions(describe_labels(XP, name, labels), start_bs.shape[0])
    return (one(start_bs, starts) + one(end_bs, ends)) / 2


def losses(head: HeadSpec, found: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Array]:
    """The losses of a head's outputs for the given labels: `loss`, and `mc_loss` of a double head.

    `given`: labels (batch, tokens), (batch,) or (batch, labels) by head kind; start_positions, end_positions;
    mc_labels; num_items_in_batch. ValueError if there are none for this head.
    """
    count, made = given.get("num_items_in_batch"), {}
    labels = {n: given[n] for n in KINDS[head.kind].labels if given.get(n) is not None}
    if not labels or (head.kind == "span" and len(labels) < 2):
        expected = " and ".join(KINDS[head.kind].labels) or "no labels"
        raise ValueError(f"a loss of this head takes {expected}, got {', '.join(given) or 'none'}")
    if head.kind == "span":
        starts, ends = labels["start_positions"], labels["end_positions"]
        return {"loss": span_loss(found["start_logits"], found["end_logits"], starts, ends, count)}
    if "labels" in labels:
        made["loss"] = _LOSSES[head.kind](head, found["logits"], labels["labels"], count)
    if "mc_labels" in labels:
        scores = found["mc_logits"]
        choices_bv = (
            scores if scores.ndim > 1 else scores[None]
        )  # without a choice axis, the rows are the choices of one example
        made["mc_loss"] = cross_entropy(choices_bv, labels["mc_labels"], count, "mc_labels")
    return made


def _shifted(_: HeadSpec, logits: Array, labels: Array, count: Count) -> Array:
    scores_bsv = logits.reshape(-1, *logits.shape[-2:])
    check_tokens_have_labels(describe_labels(XP, "labels", labels), scores_bsv.shape)
    return causal_loss(scores_bsv, labels.reshape(-1, labels.shape[-1]), count)


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
