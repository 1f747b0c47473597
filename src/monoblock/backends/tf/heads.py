"""All head kinds and their losses. Shape suffixes: b batch, s tokens, w width, v outputs.

Losses have the shapes of transformers' TF classes: (1,), a mean over tokens, for token labels; (b,), one per row, for
sequence labels. The mean of either equals the loss of the other frameworks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from monoblock.backends.tf.binding import without_keras_details
from monoblock.backends.tf.guards import check_labels
from monoblock.backends.tf.layers import Tied
from monoblock.backends.tf.namespace import XP
from monoblock.backends.tf.ops import Tensor, size
from monoblock.backends.tf.parts import Part
from monoblock.backends.xla.checked import describe_labels
from monoblock.backends.xla.inputs import ForwardOptions
from monoblock.call_checks import (
    IGNORED,
    check_classes,
    check_token_positions,
    check_tokens_have_labels,
    problem_of,
)
from monoblock.heads import KINDS, HeadSpec, Summary
from monoblock.spec import ArchSpec

Given = Mapping[str, Any]


class Pooler(Part):
    """(b, w): dense layer and tanh on the first token's hidden state."""

    def call(self, hidden_bsw: Tensor) -> Tensor:
        return self.role("head_act")(self.call_role("head_dense", hidden_bsw[:, 0]))


class LMHead(Part):
    """Dense layer, GELU, norm, and the projection to the vocabulary, whose bias belongs to this layer."""

    def prepare(self, spec: ArchSpec, layer: int) -> None:
        """Store the spec."""
        del layer
        self.spec = spec

    def make(self) -> None:
        self.bias = self.add_weight(name="bias", shape=(self.spec.vocab,), initializer="zeros")

    def call(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
        hidden = tf.nn.gelu(self.call_role("head_dense", hidden), approximate=False)
        logits = projected(self.role("head_out"), self.call_role("head_norm", hidden), table)
        return logits + tf.cast(self.bias, logits.dtype)


class ClassifierHead(Part):
    """Dense layer and tanh on the first token's hidden state, then the projection; dropout before both."""

    def call(self, hidden_bsw: Tensor, seed: Tensor | None = None) -> Tensor:
        drop = self.role("head_drop")
        hidden = tf.tanh(self.call_role("head_dense", drop(hidden_bsw[:, 0], seed=seed)))
        return self.role("head_out")(drop(hidden, seed=seed, shift=1))


class SummaryHead(Part):
    """(b, labels) or (b, w): the projected hidden state of one position per row, by default the last."""

    settings: Summary  # `summary` is the name of the projection

    def call(self, hidden_bsw: Tensor, positions: Tensor | None = None, seed: Tensor | None = None) -> Tensor:
        summary = self.settings
        if summary.pool == "mean":
            x = tf.reduce_mean(hidden_bsw, axis=1)
        elif summary.pool == "cls_index" and positions is not None:
            x = tf.gather(hidden_bsw, tf.reshape(positions, (-1,)), batch_dims=1)
        else:
            x = hidden_bsw[:, 0 if summary.pool == "first" else -1]
        x = self.role("head_drop_in")(x, seed=seed)
        x = self.role("head_summary")(x) if self.has("head_summary") else x
        return self.role("head_drop_out")(self.role("head_act")(x), seed=seed)


KINDS_OF_PARTS: dict[str, type[Part]] = {
    "pooler": Pooler,
    "lm_head": LMHead,
    "classifier_head": ClassifierHead,
    "summary": SummaryHead,
}


def projected(out: Any, hidden: Tensor, table: Tensor | None) -> Tensor:
    """The output projection of hidden states; if tied, with the embedding matrix `table` (v, w)."""
    return out(hidden, table=table) if isinstance(out, Tied) else out(hidden)


def last_tokens(
    hidden_bsw: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None, head: HeadSpec
) -> Tensor:
    """The hidden state (b, w) of each row's last token.

    It is the last unmasked token that is not the pad token; a row of pad tokens ends where its mask does. With
    `head.last_by` set to the mask, only the mask decides, which distinguishes padding from real tokens of the pad id;
    the same holds for embeddings. Without mask and ids, it is the last position.
    """
    s = size(hidden_bsw, 1)
    not_pad = (
        None
        if input_ids is None or head.pad_id is None
        else input_ids != tf.cast(head.pad_id, input_ids.dtype)
    )
    kept = None if attention_mask is None else attention_mask[:, -s:] != 0
    if (real := not_pad if kept is None else kept) is None:
        return hidden_bsw[:, -1]
    rank = tf.range(1, s + 1) * tf.cast(real, tf.int32)
    if kept is not None and not_pad is not None and head.last_by == "pad_id":
        rank += s * tf.cast(kept & not_pad, tf.int32)
    last = tf.argmax(rank, axis=-1, output_type=tf.int32)
    return tf.gather(hidden_bsw, last, batch_dims=1)


# ---------------------------------------------------------------------------- losses


def each(logits: Tensor, labels: Tensor, name: str = "labels") -> tuple[Tensor, Tensor]:
    """(n,) twice: the cross-entropy of each label, 0 for -100, and its weight, 1 or for -100 0. ValueError if the
    labels `name` do not match the logits (..., v)."""
    with without_keras_details():
        check_classes(describe_labels(XP, name, integer_labels(labels)), logits.shape)
    return _each(logits, labels)


def integer_labels(labels: Tensor) -> Tensor:
    """Labels as integers; in graphs, Keras's inputs are floats."""
    return tf.cast(labels, tf.int32) if labels.dtype.is_floating and XP.values(labels) is None else labels


def _each(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = tf.reshape(wide(logits), (-1, logits.shape[-1]))
    labels = tf.cast(tf.reshape(labels, (-1,)), tf.int32)
    real = labels != IGNORED
    labels = check_labels(labels, real, logits.shape[-1])
    found = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    return tf.where(real, found, 0.0), tf.cast(real, found.dtype)


def wide(x: Tensor) -> Tensor:
    """Half precision as float32."""
    return x if x.dtype == tf.float64 else tf.cast(x, tf.float32)


def token_loss(logits: Tensor, labels: Tensor, count: Any = None) -> Tensor:
    """(1,): the mean cross-entropy over labels other than -100, or their sum / `count` (for accumulated gradients).
    Without labels the loss and its gradient are 0."""
    return _token_loss(*each(logits, labels), count)


def _token_loss(found: Tensor, real: Tensor, count: Any) -> Tensor:
    many = tf.maximum(tf.reduce_sum(real), 1.0) if count is None else tf.cast(count, found.dtype)
    return tf.reshape(tf.reduce_sum(found) / many, (1,))


def row_loss(logits: Tensor, labels: Tensor, count: Any = None, name: str = "labels") -> Tensor:
    """(b,): the cross-entropy of each row, scaled so that their mean is the loss: the sum / `count` (by default the
    number of rows whose label is not -100)."""
    found, real = each(logits, labels, name)
    many = tf.maximum(tf.reduce_sum(real), 1.0) if count is None else tf.cast(count, found.dtype)
    return found * (tf.cast(size(found, 0), found.dtype) / many)


def causal_loss(logits_bsv: Tensor, labels_bs: Tensor, count: Any = None) -> Tensor:
    """Next-token cross-entropy: labels are the input ids; the shift is done here."""
    with without_keras_details():
        check_tokens_have_labels(describe_labels(XP, "labels", labels_bs), logits_bsv.shape)
    if None not in (lengths := (logits_bsv.shape[1], labels_bs.shape[1])) and lengths[0] != lengths[1]:
        raise ValueError(
            f"labels have {labels_bs.shape[1]} tokens, but logits have {logits_bsv.shape[1]}: "
            "leave logits_to_keep at 0 when labels are given"
        )
    with without_keras_details():
        check_classes(describe_labels(XP, "labels", integer_labels(labels_bs)), logits_bsv.shape)
    return _token_loss(*_each(logits_bsv[:, :-1], labels_bs[:, 1:]), count)


def sequence_loss(logits_bv: Tensor, labels: Tensor, problem_type: str | None, count: Any = None) -> Tensor:
    """(b,): regression (mean squared error), single-label (cross-entropy) or multi-label classification (binary
    cross-entropy); `problem_type` None: inferred from the labels."""
    with without_keras_details():
        problem_type = problem_of(describe_labels(XP, "labels", labels), logits_bv.shape, problem_type)
    if problem_type == "single_label_classification":
        return row_loss(logits_bv, labels, count)
    logits_bv = wide(logits_bv)
    labels = tf.reshape(tf.cast(labels, logits_bv.dtype), tf.shape(logits_bv))
    if problem_type == "regression":
        found = tf.reduce_mean(tf.square(logits_bv - labels), axis=-1)
    else:
        crosses = tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=logits_bv)
        found = tf.reduce_mean(crosses, axis=-1)
    rows = tf.cast(size(found, 0), found.dtype)
    return found if count is None else found * (rows / tf.cast(count, found.dtype))


def span_loss(start_bs: Tensor, end_bs: Tensor, starts: Tensor, ends: Tensor, count: Any = None) -> Tensor:
    """(b,): the mean of the start and end cross-entropies over tokens; positions outside the sequence are ignored."""
    length = size(start_bs, 1)
    with without_keras_details():
        for name, labels in (("start_positions", starts), ("end_positions", ends)):
            check_token_positions(describe_labels(XP, name, integer_labels(labels)), start_bs.shape[0])

    def one(logits: Tensor, positions: Tensor) -> Tensor:
        positions = tf.cast(tf.reshape(positions, (-1,)), tf.int32)
        outside = (positions < 0) | (positions >= length)
        logits = tf.reshape(wide(logits), (-1, length))
        found = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.where(outside, 0, positions), logits)
        real = tf.cast(~outside, found.dtype)
        many = tf.maximum(tf.reduce_sum(real), 1.0) if count is None else tf.cast(count, found.dtype)
        return tf.where(outside, 0.0, found) * (tf.cast(size(found, 0), found.dtype) / many)

    return (one(start_bs, starts) + one(end_bs, ends)) / 2


# ---------------------------------------------------------------------------- outputs


class Head:
    """A model's head in one forward pass: its current spec, the embedding matrix if tied, the seed of dropout."""

    def __init__(self, model: Any, spec: HeadSpec, table: Tensor | None, seed: Tensor | None) -> None:
        self.model, self.spec, self.table, self.seed = model, spec, table, seed

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (..., v); vocabulary logits are scaled and soft-capped as in the spec."""
        model = self.model
        if model.has("classifier_head"):
            return model.role("classifier_head")(hidden, seed=self.seed)
        if model.has("head_drop"):
            hidden = model.role("head_drop")(hidden, seed=self.seed, shift=1)
        if model.has("lm_head"):
            logits = model.role("lm_head")(hidden, table=self.table)
        else:
            logits = projected(model.role("head_out"), hidden, self.table)
        return scaled(logits, model.spec) if KINDS[self.spec.kind].size == "vocab" else logits


def scaled(logits: Tensor, spec: ArchSpec) -> Tensor:
    """Apply the spec's factor and soft cap to vocabulary logits."""
    if spec.logit_scale != 1.0:
        logits = logits * spec.logit_scale
    if (cap := spec.logit_softcap) is not None:
        logits = cap * tf.tanh(logits / cap)
    return logits


def outputs(head: Head, hidden_bsw: Tensor, given: Given, options: ForwardOptions) -> dict[str, Any]:
    """The logits and, with labels, the loss, by the names of the head kind's output."""
    return _OUTPUTS[head.spec.kind](head, hidden_bsw, given, options)


def _causal(head: Head, hidden: Tensor, given: Given, options: ForwardOptions) -> dict[str, Any]:
    if options.keep:
        hidden = hidden[:, -options.keep :]
    logits, labels = head(hidden), given.get("labels")
    loss = None if labels is None else causal_loss(logits, labels, given.get("num_items_in_batch"))
    return {"loss": loss, "logits": logits}


def _sequence(head: Head, hidden: Tensor, given: Given, _: ForwardOptions) -> dict[str, Any]:
    if head.spec.pad_id is None and (hidden.shape[0] or 1) > 1:
        raise ValueError(
            "Cannot handle batch sizes > 1 if no padding token is defined: set model.config.pad_token_id"
        )
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    return _classified(head, head(last_tokens(hidden, ids, mask, head.spec)), given)


def _first(head: Head, hidden: Tensor, given: Given, _: ForwardOptions) -> dict[str, Any]:
    return _classified(head, head(hidden), given)


def _classified(head: Head, logits: Tensor, given: Given) -> dict[str, Any]:
    labels, loss = given.get("labels"), None
    if labels is not None:
        loss = sequence_loss(logits, labels, head.spec.problem_type, given.get("num_items_in_batch"))
    return {"loss": loss, "logits": logits}


def _choice(head: Head, hidden: Tensor, given: Given, options: ForwardOptions) -> dict[str, Any]:
    labels, count = given.get("labels"), given.get("num_items_in_batch")
    pooled = head.model.main.role("pooler")(hidden)
    logits = tf.reshape(head(pooled), (-1, options.choices))
    return {"loss": None if labels is None else row_loss(logits, labels, count), "logits": logits}


def _double(head: Head, hidden: Tensor, given: Given, options: ForwardOptions) -> dict[str, Any]:
    """Language model and multiple choice over hidden states of (batch * choices, s, w)."""
    count, choices = given.get("num_items_in_batch"), options.choices
    summary = head.model.role("summary")
    logits, scores = head(hidden), summary(hidden, positions=given.get("mc_token_ids"), seed=head.seed)
    loss = mc_loss = None
    if (labels := given.get("labels")) is not None:
        with without_keras_details():
            check_tokens_have_labels(describe_labels(XP, "labels", labels), logits.shape)
        loss = causal_loss(logits, tf.reshape(labels, (-1, size(labels, -1))), count)
    if options.nested:
        scores = tf.reshape(scores, (-1, choices, *scores.shape[1:]))
    scores = tf.squeeze(scores, -1) if scores.shape[-1] == 1 else scores
    if (mc_labels := given.get("mc_labels")) is not None:
        choices_bv = (
            scores if len(scores.shape) > 1 else scores[None]
        )  # without a choice axis, the rows are the choices of one example
        mc_loss = row_loss(choices_bv, mc_labels, count, "mc_labels")
    if options.nested:
        logits = tf.reshape(logits, (-1, choices, size(logits, 1), logits.shape[-1]))
    return {"loss": loss, "mc_loss": mc_loss, "logits": logits, "mc_logits": scores}


def _token(head: Head, hidden: Tensor, given: Given, _: ForwardOptions) -> dict[str, Any]:
    logits, labels = head(hidden), given.get("labels")
    loss = None if labels is None else token_loss(logits, labels, given.get("num_items_in_batch"))
    return {"loss": loss, "logits": logits}


def _span(head: Head, hidden: Tensor, given: Given, _: ForwardOptions) -> dict[str, Any]:
    start, end = tf.unstack(head(hidden), num=2, axis=-1)
    starts, ends = given.get("start_positions"), given.get("end_positions")
    loss = None
    if starts is not None and ends is not None:
        loss = span_loss(start, end, starts, ends, given.get("num_items_in_batch"))
    return {"loss": loss, "start_logits": start, "end_logits": end}


_OUTPUTS = {
    "causal": _causal,
    "masked": _token,
    "double": _double,
    "sequence": _sequence,
    "first": _first,
    "choice": _choice,
    "token": _token,
    "span": _span,
}
