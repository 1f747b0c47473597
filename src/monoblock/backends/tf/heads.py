"""Every head kind and its loss, once. Shape suffixes: b batch, s tokens, w width, v outputs.

Losses have the shapes of the old TF classes: (1,), a mean over tokens, for labels of tokens; (b,), one for each row,
for labels of rows. The mean of either is the loss of the other frameworks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from monoblock.backends.tf.layers import NormLayer, Part, Tied, make_linear
from monoblock.backends.tf.model import HEAD
from monoblock.backends.tf.ops import Tensor, dropped, size
from monoblock.backends.xla.inputs import Wanted
from monoblock.heads import KINDS, HeadSpec
from monoblock.spec import ArchSpec

IGNORED = -100
Given = Mapping[str, Any]


class Head(Part):
    """Dropout, a dense layer where the kind has one, and a projection; a tied one's matrix is the embedding's."""

    def __init__(self, spec: ArchSpec, head: HeadSpec, tied: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.spec, self.arch, kind, policy = head, spec, KINDS[head.kind], self.dtype_policy
        self.vocabulary, self.tied = kind.size == "vocab", tied
        self.dense = make_linear(spec, spec.width, True, "dense", policy) if kind.dense else None
        self.act = _DENSE_ACT[kind.dense] if kind.dense else None
        self.drop_in = kind.drop_in
        self.norm = NormLayer(head.norm, name="norm", dtype=policy) if head.norm else None
        outputs, summary = head.size(spec.vocab), head.summary
        self.out = self.summary = None
        if tied:
            self.out = Tied(kind.bias, name="out", dtype=policy)
        elif outputs is not None:
            self.out = make_linear(spec, outputs, kind.bias, "out", policy)
        if summary and summary.size is not None:
            self.summary = make_linear(spec, summary.size, True, "summary", policy)

    def make(self) -> None:
        for part in (self.dense, self.norm, self.summary):
            if part is not None:
                part.build((None, None, self.arch.width))
        if self.out is not None:
            self.out.build((self.arch.vocab,) if self.tied else (None, None, self.arch.width))

    def call(self, hidden: Tensor, table: Tensor | None = None, seed: Tensor | None = None) -> Tensor:
        """Logits (..., v) of hidden states (..., w); those over the vocabulary are scaled and capped as the spec says.
        Without a projection, the dense layer's output. `table` (v, w) is the embedding's, where it is tied."""
        if self.dense is not None and self.act is not None:
            hidden = dropped(hidden, self.spec.dropout if self.drop_in else 0.0, seed, HEAD)
            hidden = self.act(self.dense(hidden))
            hidden = hidden if self.norm is None else self.norm(hidden)
        if self.out is None:
            return hidden
        hidden = dropped(hidden, self.spec.dropout, seed, HEAD + 1)
        logits = self.out(hidden, table=table) if self.tied else self.out(hidden)
        if self.vocabulary and self.arch.logit_scale != 1.0:
            logits = logits * self.arch.logit_scale
        if self.vocabulary and (cap := self.arch.logit_softcap) is not None:
            logits = cap * tf.tanh(logits / cap)
        return logits


def last_tokens(
    hidden_bsw: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None, pad_id: int | None
) -> Tensor:
    """The hidden state (b, w) of each row's last token that is not padding.

    An attention mask tells padding from a real token of the same id; without one the pad id does. With neither,
    or with embeddings as input, it is the last place.
    """
    count = size(hidden_bsw, 1)
    if attention_mask is not None:
        real = attention_mask[:, -count:] != 0
    elif input_ids is not None and pad_id is not None:
        real = input_ids != tf.cast(pad_id, input_ids.dtype)
    else:
        return hidden_bsw[:, -1]
    last = tf.argmax(tf.range(count) * tf.cast(real, tf.int32), axis=-1, output_type=tf.int32)
    return tf.gather(hidden_bsw, last, batch_dims=1)


# ---------------------------------------------------------------------------- losses


def each(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each label (n,), 0 for those that are -100, and 1 for the others, 0 for those."""
    logits = tf.reshape(wide(logits), (-1, logits.shape[-1]))
    labels = tf.cast(tf.reshape(labels, (-1,)), tf.int32)
    real = labels != IGNORED
    found = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.where(real, labels, 0), logits)
    return tf.where(real, found, 0.0), tf.cast(real, found.dtype)


def wide(x: Tensor) -> Tensor:
    """Half precision as float32."""
    return x if x.dtype == tf.float64 else tf.cast(x, tf.float32)


def token_loss(logits: Tensor, labels: Tensor, count: Any = None) -> Tensor:
    """(1,): the mean over the labels that are not -100, or their sum over `count` (for accumulated gradients). Without
    any label the loss is 0, with a zero gradient."""
    found, real = each(logits, labels)
    many = tf.maximum(tf.reduce_sum(real), 1.0) if count is None else tf.cast(count, found.dtype)
    return tf.reshape(tf.reduce_sum(found) / many, (1,))


def row_loss(logits: Tensor, labels: Tensor, count: Any = None) -> Tensor:
    """(b,): the cross-entropy of each row, which stands for 1 / `count` of the whole (by default 1 / the number of rows
    whose label is not -100), so that the mean of these is the loss."""
    found, real = each(logits, labels)
    many = tf.maximum(tf.reduce_sum(real), 1.0) if count is None else tf.cast(count, found.dtype)
    return found * (tf.cast(size(found, 0), found.dtype) / many)


def causal_loss(logits_bsv: Tensor, labels_bs: Tensor, count: Any = None) -> Tensor:
    """Each token predicts the next one: labels are the input ids, shifted here."""
    if None not in (known := (logits_bsv.shape[1], labels_bs.shape[1])) and known[0] != known[1]:
        raise ValueError(
            f"labels of {labels_bs.shape[1]} tokens came with logits of {logits_bsv.shape[1]}: "
            "leave logits_to_keep at 0 when labels are given"
        )
    return token_loss(logits_bsv[:, :-1], labels_bs[:, 1:], count)


def sequence_loss(logits_bv: Tensor, labels: Tensor, problem_type: str | None, count: Any = None) -> Tensor:
    """Regression (mean square), one class (cross-entropy) or several (binary cross-entropy), (b,); the type is
    inferred from the labels of this call when None is given."""
    if problem_type is None:
        whole = not labels.dtype.is_floating
        problem_type = "single_label_classification" if whole else "multi_label_classification"
        if logits_bv.shape[-1] == 1:
            problem_type = "regression"
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
    """The mean of two cross-entropies over the tokens, (b,); positions outside the text are ignored."""
    length = size(start_bs, 1)

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


class Projection:
    """A head in one call: its spec now, the table that it may be tied to, and the seed of its dropouts."""

    def __init__(self, head: Head, spec: HeadSpec, table: Tensor | None, seed: Tensor | None) -> None:
        self.head, self.spec, self.table, self.seed = head, spec, table, seed

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.head(hidden, table=self.table, seed=self.seed)


def outputs(head: Projection, hidden_bsw: Tensor, given: Given, wanted: Wanted) -> dict[str, Any]:
    """The logits and, with labels, the loss, by the names of the head kind's output."""
    return _OUTPUTS[head.spec.kind](head, hidden_bsw, given, wanted)


def _causal(head: Projection, hidden: Tensor, given: Given, wanted: Wanted) -> dict[str, Any]:
    if wanted.keep:
        hidden = hidden[:, -wanted.keep :]
    logits, labels = head(hidden), given.get("labels")
    loss = None if labels is None else causal_loss(logits, labels, given.get("num_items_in_batch"))
    return {"loss": loss, "logits": logits}


def _sequence(head: Projection, hidden: Tensor, given: Given, _: Wanted) -> dict[str, Any]:
    pad_id = head.spec.pad_id
    if pad_id is None and (hidden.shape[0] or 1) > 1:
        raise ValueError(
            "Cannot handle batch sizes > 1 if no padding token is defined: set model.config.pad_token_id"
        )
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    return _classified(head, head(last_tokens(hidden, ids, mask, pad_id)), given)


def _first(head: Projection, hidden: Tensor, given: Given, _: Wanted) -> dict[str, Any]:
    return _classified(head, head(hidden[:, 0]), given)


def _classified(head: Projection, logits: Tensor, given: Given) -> dict[str, Any]:
    labels, loss = given.get("labels"), None
    if labels is not None:
        loss = sequence_loss(logits, labels, head.spec.problem_type, given.get("num_items_in_batch"))
    return {"loss": loss, "logits": logits}


def _pooler(head: Projection, hidden: Tensor, _: Given, __: Wanted) -> dict[str, Any]:
    return {"last_hidden_state": hidden, "pooler_output": head(hidden[:, 0])}


def _choice(head: Projection, hidden: Tensor, given: Given, wanted: Wanted) -> dict[str, Any]:
    labels, count = given.get("labels"), given.get("num_items_in_batch")
    logits = tf.reshape(head(hidden[:, 0]), (-1, wanted.choices))
    return {"loss": None if labels is None else row_loss(logits, labels, count), "logits": logits}


def _double(head: Projection, hidden: Tensor, given: Given, wanted: Wanted) -> dict[str, Any]:
    """Language model and multiple choice over hidden states of (batch * choices, s, w)."""
    count, choices = given.get("num_items_in_batch"), wanted.choices
    logits, scores = head(hidden), summarised(head, hidden, given.get("mc_token_ids"))
    loss = mc_loss = None
    if (labels := given.get("labels")) is not None:
        loss = causal_loss(logits, tf.reshape(labels, (-1, size(labels, -1))), count)
    if wanted.nested:
        scores = tf.reshape(scores, (-1, choices, *scores.shape[1:]))
    scores = tf.squeeze(scores, -1) if scores.shape[-1] == 1 else scores
    if (mc_labels := given.get("mc_labels")) is not None:
        mc_loss = row_loss(scores, mc_labels, count)
    if wanted.nested:
        logits = tf.reshape(logits, (-1, choices, size(logits, 1), logits.shape[-1]))
    return {"loss": loss, "mc_loss": mc_loss, "logits": logits, "mc_logits": scores}


def summarised(head: Projection, hidden_bsw: Tensor, places: Tensor | None) -> Tensor:
    """One vector a row, (b, labels) or (b, w): of the place asked for (the last one by default), projected."""
    summary = head.spec.summary
    assert summary is not None
    if summary.pool == "mean":
        x = tf.reduce_mean(hidden_bsw, axis=1)
    elif summary.pool == "cls_index" and places is not None:
        x = tf.gather(hidden_bsw, tf.reshape(places, (-1,)), batch_dims=1)
    else:
        x = hidden_bsw[:, 0 if summary.pool == "first" else -1]
    x = dropped(x, summary.dropout_in, head.seed, HEAD + 2)
    x = head.head.summary(x) if head.head.summary is not None else x
    x = tf.tanh(x) if summary.tanh else x
    return dropped(x, summary.dropout_out, head.seed, HEAD + 3)


def _token(head: Projection, hidden: Tensor, given: Given, _: Wanted) -> dict[str, Any]:
    logits, labels = head(hidden), given.get("labels")
    loss = None if labels is None else token_loss(logits, labels, given.get("num_items_in_batch"))
    return {"loss": loss, "logits": logits}


def _span(head: Projection, hidden: Tensor, given: Given, _: Wanted) -> dict[str, Any]:
    start, end = tf.unstack(head(hidden), num=2, axis=-1)
    starts, ends = given.get("start_positions"), given.get("end_positions")
    loss = None
    if starts is not None and ends is not None:
        loss = span_loss(start, end, starts, ends, given.get("num_items_in_batch"))
    return {"loss": loss, "start_logits": start, "end_logits": end}


_DENSE_ACT: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": tf.tanh,
    "gelu": lambda x: tf.nn.gelu(x, approximate=False),
}

_OUTPUTS = {
    "causal": _causal,
    "masked": _token,
    "double": _double,
    "sequence": _sequence,
    "first": _first,
    "choice": _choice,
    "pooler": _pooler,
    "token": _token,
    "span": _span,
}
