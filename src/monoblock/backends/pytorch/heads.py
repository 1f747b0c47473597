"""Every head kind and its loss, once. Shape suffixes: b batch, s tokens, w width, v outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monoblock.backends.pytorch.kernels.linear import Linear
from monoblock.backends.pytorch.model import make_norm
from monoblock.heads import KINDS, HeadSpec
from monoblock.spec import ArchSpec

IGNORED = -100
Count = Tensor | int | None


class Head(nn.Module):
    """Dropout, a dense layer where the kind has one, and a projection; a tied one's matrix is the embedding's."""

    def __init__(self, spec: ArchSpec, head: HeadSpec) -> None:
        super().__init__()
        self.spec, kind = head, KINDS[head.kind]
        self.vocabulary = kind.size == "vocab"
        self.scale, self.softcap = spec.logit_scale, spec.logit_softcap
        self.dropout = nn.Dropout(head.dropout)
        self.dense = Linear(spec.width, spec.width) if kind.dense else None
        self.act = _DENSE_ACT[kind.dense] if kind.dense else None
        self.drop_in = kind.drop_in
        self.norm = make_norm(head.norm, spec.width) if head.norm else nn.Identity()
        size = head.size(spec.vocab)
        self.out = None if size is None else Linear(spec.width, size, bias=kind.bias)
        summary = head.summary
        self.summary = Linear(spec.width, summary.size) if summary and summary.size is not None else None

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (..., v) of hidden states (..., w); those over the vocabulary are scaled and capped as the spec says.
        Without a projection, the dense layer's output."""
        if self.dense is not None and self.act is not None:
            hidden = self.dropout(hidden) if self.drop_in else hidden
            hidden = self.norm(self.act(self.dense(hidden)))
        if self.out is None:
            return hidden
        logits = self.out(self.dropout(hidden))
        if self.vocabulary and self.scale != 1.0:
            logits = logits * self.scale
        if self.vocabulary and self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def last_tokens(
    hidden_bsw: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None, pad_id: int | None
) -> Tensor:
    """The hidden state (b, w) of each row's last token that is not padding.

    An attention mask tells padding from a real token of the same id; without one the pad id does. With neither,
    or with embeddings as input, it is the last place.
    """
    b, s = hidden_bsw.shape[:2]
    if attention_mask is not None and attention_mask.dim() == 2:
        real = attention_mask[:, -s:] != 0
    elif input_ids is not None and pad_id is not None:
        real = input_ids != pad_id
    else:
        return hidden_bsw[:, -1]
    places = torch.arange(s, device=hidden_bsw.device)
    last = (places * real.to(places.device)).argmax(-1)
    return hidden_bsw[torch.arange(b, device=last.device), last]


def cross_entropy(logits: Tensor, labels: Tensor, count: Count = None) -> Tensor:
    """Mean over the labels that are not -100, or their sum over `count` (for accumulated gradients). Without any
    label the loss is 0, with a zero gradient."""
    logits, labels = logits.float().flatten(0, -2), labels.long().flatten().to(logits.device)
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    if count is None:
        count = (labels != IGNORED).sum().clamp(min=1)
    return total / count


def causal_loss(logits_bsv: Tensor, labels_bs: Tensor, count: Count = None) -> Tensor:
    """Each token predicts the next one: labels are the input ids, shifted here."""
    if logits_bsv.shape[1] != labels_bs.shape[1]:
        raise ValueError(
            f"labels of {labels_bs.shape[1]} tokens came with logits of {logits_bsv.shape[1]}: "
            "leave logits_to_keep at 0 when labels are given"
        )
    return cross_entropy(logits_bsv[:, :-1], labels_bs[:, 1:], count)


def sequence_loss(logits_bv: Tensor, labels: Tensor, problem_type: str | None, count: Count = None) -> Tensor:
    """Regression (mean square), one class (cross-entropy) or several (binary cross-entropy); the type is inferred
    from the labels of this call when None is given."""
    labels = labels.to(logits_bv.device)
    if problem_type is None:
        whole = not labels.is_floating_point()
        problem_type = "single_label_classification" if whole else "multi_label_classification"
        if logits_bv.shape[-1] == 1:
            problem_type = "regression"
    if problem_type == "single_label_classification":
        return cross_entropy(logits_bv, labels, count)
    logits_bv = logits_bv.float()
    labels = labels.to(logits_bv.dtype).reshape(logits_bv.shape)
    loss = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
    if count is None:
        return loss(logits_bv, labels)
    return loss(logits_bv, labels, reduction="sum") / (count * logits_bv.shape[-1])


def span_loss(start_bs: Tensor, end_bs: Tensor, starts: Tensor, ends: Tensor, count: Count = None) -> Tensor:
    """The mean of two cross-entropies over the tokens; positions outside the text are ignored."""
    length = start_bs.shape[1]

    def one(logits: Tensor, positions: Tensor) -> Tensor:
        positions = positions.to(logits.device).long().reshape(-1)
        outside = (positions < 0) | (positions >= length)
        return cross_entropy(logits, positions.masked_fill(outside, IGNORED), count)

    return (one(start_bs, starts) + one(end_bs, ends)) / 2


def outputs(head: Head, hidden_bsw: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """The logits and, with labels, the loss, by the names of the head kind's output."""
    return _OUTPUTS[head.spec.kind](head, hidden_bsw, given)


def _causal(head: Head, hidden: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    keep = given.get("logits_to_keep")
    if isinstance(keep, Tensor):
        hidden = hidden[:, keep]
    elif keep:
        hidden = hidden[:, -keep:]
    logits, labels = head(hidden), given.get("labels")
    loss = None if labels is None else causal_loss(logits, labels, given.get("num_items_in_batch"))
    return {"loss": loss, "logits": logits}


def _sequence(head: Head, hidden: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    pad_id = head.spec.pad_id
    if pad_id is None and hidden.shape[0] > 1:
        raise ValueError(
            "Cannot handle batch sizes > 1 if no padding token is defined: set model.config.pad_token_id"
        )
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    return _classified(head, head(last_tokens(hidden, ids, mask, pad_id)), given)


def _first(head: Head, hidden: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    return _classified(head, head(hidden[:, 0]), given)


def _classified(head: Head, logits: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    labels, loss = given.get("labels"), None
    if labels is not None:
        loss = sequence_loss(logits, labels, head.spec.problem_type, given.get("num_items_in_batch"))
    return {"loss": loss, "logits": logits}


def _pooler(head: Head, hidden: Tensor, _: dict[str, Any]) -> dict[str, Any]:
    return {"last_hidden_state": hidden, "pooler_output": head(hidden[:, 0])}


def _choice(head: Head, hidden: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    labels, count = given.get("labels"), given.get("num_items_in_batch")
    logits = head(hidden[:, 0]).view(-1, given["choices"])
    return {"loss": None if labels is None else cross_entropy(logits, labels, count), "logits": logits}


def _double(head: Head, hidden: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """Language model and multiple choice over hidden states of (batch * choices, s, w)."""
    count, choices = given.get("num_items_in_batch"), given["choices"]
    logits = head(hidden)
    scores = summarised(head, hidden, given.get("mc_token_ids"))
    loss = mc_loss = None
    if (labels := given.get("labels")) is not None:
        loss = causal_loss(logits, labels.reshape(-1, labels.shape[-1]), count)
    scores = (scores.view(-1, choices, *scores.shape[1:]) if given["nested"] else scores).squeeze(-1)
    if (mc_labels := given.get("mc_labels")) is not None:
        mc_loss = cross_entropy(scores, mc_labels, count)
    logits = logits.view(-1, choices, *logits.shape[1:]) if given["nested"] else logits
    return {"loss": loss, "mc_loss": mc_loss, "logits": logits, "mc_logits": scores}


def summarised(head: Head, hidden_bsw: Tensor, places: Tensor | None) -> Tensor:
    """One vector a row, (b, labels) or (b, w): of the place asked for (the last one by default), projected."""
    summary = head.spec.summary
    assert summary is not None
    if summary.pool == "mean":
        x = hidden_bsw.mean(dim=1)
    elif summary.pool == "cls_index" and places is not None:
        rows = torch.arange(hidden_bsw.shape[0], device=hidden_bsw.device)
        x = hidden_bsw[rows, places.reshape(-1).to(hidden_bsw.device)]
    else:
        x = hidden_bsw[:, 0 if summary.pool == "first" else -1]
    x = F.dropout(x, summary.dropout_in, head.training)
    x = head.summary(x) if head.summary is not None else x
    x = torch.tanh(x) if summary.tanh else x
    return F.dropout(x, summary.dropout_out, head.training)


def _token(head: Head, hidden: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    logits, labels = head(hidden), given.get("labels")
    loss = None if labels is None else cross_entropy(logits, labels, given.get("num_items_in_batch"))
    return {"loss": loss, "logits": logits}


def _span(head: Head, hidden: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    start, end = (x.contiguous() for x in head(hidden).unbind(-1))
    starts, ends = given.get("start_positions"), given.get("end_positions")
    loss = None
    if starts is not None and ends is not None:
        loss = span_loss(start, end, starts, ends, given.get("num_items_in_batch"))
    return {"loss": loss, "start_logits": start, "end_logits": end}


_DENSE_ACT: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "gelu": F.gelu}

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
