"""The heads of all kinds and their losses. Shape suffixes: b batch, s tokens, w width, v outputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from monoblock.backends.pytorch import checked
from monoblock.backends.pytorch.kernels import dispatch
from monoblock.backends.pytorch.parts import Part
from monoblock.call_checks import (
    IGNORED,
    Labels,
    check_classes,
    check_token_positions,
    check_tokens_have_labels,
    problem_of,
)
from monoblock.heads import KINDS, HeadSpec, Summary

Count = Tensor | int | None


class Pooler(Part):
    """The first token's hidden state through a dense layer and tanh; (b, w)."""

    def forward(self, hidden_bsw: Tensor) -> Tensor:
        return self.role("head_act")(self.role("head_dense")(hidden_bsw[:, 0]))


class LMHead(Part):
    """Dense layer, GELU, norm, and the projection to the vocabulary, whose bias is the part's own too."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.role("head_out")(self.role("head_norm")(F.gelu(self.role("head_dense")(hidden))))


class ClassifierHead(Part):
    """The first token's hidden state through a dense layer and tanh, projected; dropout before both."""

    def forward(self, hidden_bsw: Tensor) -> Tensor:
        drop = self.role("head_drop")
        hidden = torch.tanh(self.role("head_dense")(drop(hidden_bsw[:, 0])))
        return self.role("head_out")(drop(hidden))


class SummaryHead(Part):
    """One vector a row, (b, labels) or (b, w): of the position asked for (the last one by default), projected."""

    settings: Summary

    def forward(self, hidden_bsw: Tensor, positions: Tensor | None = None) -> Tensor:
        summary = self.settings
        if summary.pool == "mean":
            x = hidden_bsw.mean(dim=1)
        elif summary.pool == "cls_index" and positions is not None:
            checked.check_chosen(positions, *hidden_bsw.shape[:2])
            rows = torch.arange(hidden_bsw.shape[0], device=hidden_bsw.device)
            x = hidden_bsw[rows, positions.reshape(-1).long().to(hidden_bsw.device)]
        else:
            x = hidden_bsw[:, 0 if summary.pool == "first" else -1]
        x = self.role("head_act")(self.role("head_summary")(self.role("head_drop_in")(x)))
        return self.role("head_drop_out")(x)


KINDS_OF_PARTS: dict[str, type[Part]] = {
    "pooler": Pooler,
    "lm_head": LMHead,
    "classifier_head": ClassifierHead,
    "summary": SummaryHead,
}


def logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits (..., v) of hidden states (..., w); those over the vocabulary are scaled and capped according to the
    spec."""
    for container in ("lm_head", "classifier_head"):
        if model.has(container):
            return _scaled(model, model.role(container)(hidden))
    if model.has("head_drop"):
        hidden = model.role("head_drop")(hidden)
    return _scaled(model, model.role("head_out")(hidden))


def _scaled(model: Any, logits: Tensor) -> Tensor:
    spec = model.spec
    if KINDS[model.head_spec.kind].size == "vocab":
        if spec.logit_scale != 1.0:
            logits = logits * spec.logit_scale
        if spec.logit_softcap is not None:
            logits = spec.logit_softcap * torch.tanh(logits / spec.logit_softcap)
    return logits


def last_tokens(
    hidden_bsw: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None, head: HeadSpec
) -> Tensor:
    """The hidden state (b, w) of each row's last token.

    That is the last unmasked token that is not the pad token; in a row of pad tokens, the last unmasked one. With
    `head.last_by` other than "pad_id" the attention mask alone decides, which distinguishes padding from a real token
    of the same id; so it does for embeddings. Without ids and mask, it is the last position.
    """
    b, s = hidden_bsw.shape[:2]
    not_pad = None if input_ids is None or head.pad_id is None else input_ids != head.pad_id
    kept = None if attention_mask is None or attention_mask.dim() != 2 else attention_mask[:, -s:] != 0
    if (real := not_pad if kept is None else kept) is None:
        return hidden_bsw[:, -1]
    counted = torch.arange(1, s + 1, device=hidden_bsw.device)
    rank = counted * real.to(counted.device)
    if kept is not None and not_pad is not None and head.last_by == "pad_id":
        # `counted[-1]` is s, as a tensor: the ONNX exporter multiplies no booleans by a symbolic number.
        rank = rank + counted[-1] * (kept & not_pad).to(counted.device)
    return hidden_bsw[torch.arange(b, device=rank.device), rank.argmax(-1)]


def _described(name: str, labels: Tensor) -> Labels:
    """Labels for the checks; with values only if on the CPU, to avoid a synchronisation."""
    on_host = labels.device.type == "cpu" and not labels.is_floating_point() and dispatch.readable(labels)
    values = labels.numpy() if on_host else None
    return Labels(name, labels.shape, str(labels.dtype).removeprefix("torch."), values)


def cross_entropy(logits: Tensor, labels: Tensor, count: Count = None, name: str = "labels") -> Tensor:
    """Mean over the labels that are not -100, or their sum over `count` (for accumulated gradients). Without any
    label the loss is 0, with a zero gradient. ValueError: `name` holds no class for each of the logits (..., v)."""
    check_classes(_described(name, labels), logits.shape)
    return _cross_entropy(logits, labels, count)


def _cross_entropy(logits: Tensor, labels: Tensor, count: Count) -> Tensor:
    logits, labels = logits.float().flatten(0, -2), labels.long().flatten().to(logits.device)
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    if count is None:
        return total / (labels != IGNORED).sum().clamp(min=1)
    return total / checked.check_count(count)


def causal_loss(logits_bsv: Tensor, labels_bs: Tensor, count: Count = None) -> Tensor:
    """Each token predicts the next one: labels are the input ids, shifted here."""
    labels = _described("labels", labels_bs)
    check_tokens_have_labels(labels, logits_bsv.shape)
    if logits_bsv.shape[1] != labels_bs.shape[1]:
        raise ValueError(
            f"labels have {labels_bs.shape[1]} tokens, but logits have {logits_bsv.shape[1]}: "
            "leave logits_to_keep at 0 when labels are given"
        )
    check_classes(labels, logits_bsv.shape)
    return _cross_entropy(logits_bsv[:, :-1], labels_bs[:, 1:], count)


def sequence_loss(logits_bv: Tensor, labels: Tensor, problem_type: str | None, count: Count = None) -> Tensor:
    """Regression (mean square), one class (cross-entropy) or several (binary cross-entropy); the type is inferred
    from the labels of this call when None is given."""
    problem_type = problem_of(_described("labels", labels), logits_bv.shape, problem_type)
    if problem_type == "single_label_classification":
        return cross_entropy(logits_bv, labels, count)
    labels = labels.to(logits_bv.device)
    logits_bv = logits_bv.float()
    labels = labels.to(logits_bv.dtype).reshape(logits_bv.shape)
    loss = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
    if count is None:
        return loss(logits_bv, labels)
    return loss(logits_bv, labels, reduction="sum") / (checked.check_count(count) * logits_bv.shape[-1])


def span_loss(start_bs: Tensor, end_bs: Tensor, starts: Tensor, ends: Tensor, count: Count = None) -> Tensor:
    """The mean of two cross-entropies over the tokens; positions outside the sequence are ignored."""
    length = start_bs.shape[1]

    def one(logits: Tensor, positions: Tensor) -> Tensor:
        positions = positions.to(logits.device).long().reshape(-1)
        outside = (positions < 0) | (positions >= length)
        return _cross_entropy(logits, positions.masked_fill(outside, IGNORED), count)

    for name, positions in (("start_positions", starts), ("end_positions", ends)):
        check_token_positions(_described(name, positions), start_bs.shape[0])
    return (one(start_bs, starts) + one(end_bs, ends)) / 2


def outputs(model: Any, out: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The logits and, with labels, the loss, of the bare model's output, by the names of the head kind's output."""
    return _OUTPUTS[model.head_spec.kind](model, out, given)


def _causal(model: Any, out: Any, given: dict[str, Any]) -> dict[str, Any]:
    hidden, keep = out.last_hidden_state, given.get("logits_to_keep")
    checked.check_kept(keep, hidden.shape[1])
    if isinstance(keep, Tensor):
        hidden = hidden[:, keep.long()]
    elif keep:
        hidden = hidden[:, -keep:]
    scores, labels = logits(model, hidden), given.get("labels")
    loss = None if labels is None else causal_loss(scores, labels, given.get("num_items_in_batch"))
    return {"loss": loss, "logits": scores}


def _sequence(model: Any, out: Any, given: dict[str, Any]) -> dict[str, Any]:
    hidden, head = out.last_hidden_state, model.current_head()
    if head.pad_id is None and hidden.shape[0] > 1:
        raise ValueError(
            "Cannot handle batch sizes > 1 if no padding token is defined: set model.config.pad_token_id"
        )
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    return _classified(model, logits(model, last_tokens(hidden, ids, mask, head)), given)


def _first(model: Any, out: Any, given: dict[str, Any]) -> dict[str, Any]:
    return _classified(model, logits(model, out.last_hidden_state), given)


def _classified(model: Any, scores: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    labels, loss = given.get("labels"), None
    if labels is not None:
        loss = sequence_loss(
            scores, labels, model.current_head().problem_type, given.get("num_items_in_batch")
        )
    return {"loss": loss, "logits": scores}


def _choice(model: Any, out: Any, given: dict[str, Any]) -> dict[str, Any]:
    labels, count = given.get("labels"), given.get("num_items_in_batch")
    scores = logits(model, out.pooler_output).view(-1, given["choices"])
    return {"loss": None if labels is None else cross_entropy(scores, labels, count), "logits": scores}


def _double(model: Any, out: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Language model and multiple choice over hidden states of (batch * choices, s, w)."""
    hidden, count, choices = out.last_hidden_state, given.get("num_items_in_batch"), given["choices"]
    words = logits(model, hidden)
    scores = model.role("summary")(hidden, given.get("mc_token_ids"))
    loss = mc_loss = None
    if (labels := given.get("labels")) is not None:
        check_tokens_have_labels(_described("labels", labels), words.shape)
        loss = causal_loss(words, labels.reshape(-1, labels.shape[-1]), count)
    scores = (scores.view(-1, choices, *scores.shape[1:]) if given["nested"] else scores).squeeze(-1)
    if (mc_labels := given.get("mc_labels")) is not None:
        # Without an axis of choices, the rows are the choices of one example.
        choices_bv = scores if scores.dim() > 1 else scores[None]
        mc_loss = cross_entropy(choices_bv, mc_labels, count, "mc_labels")
    words = words.view(-1, choices, *words.shape[1:]) if given["nested"] else words
    return {"loss": loss, "mc_loss": mc_loss, "logits": words, "mc_logits": scores}


def _token(model: Any, out: Any, given: dict[str, Any]) -> dict[str, Any]:
    scores, labels = logits(model, out.last_hidden_state), given.get("labels")
    loss = None if labels is None else cross_entropy(scores, labels, given.get("num_items_in_batch"))
    return {"loss": loss, "logits": scores}


def _span(model: Any, out: Any, given: dict[str, Any]) -> dict[str, Any]:
    start, end = (x.contiguous() for x in logits(model, out.last_hidden_state).unbind(-1))
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
