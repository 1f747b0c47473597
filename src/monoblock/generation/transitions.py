"""The score of each generated token, looked up in the scores that `generate` returned."""

from __future__ import annotations

from collections.abc import Sequence

from monoblock.generation.arrays import Array, ArrayOps


def transition_scores(
    ops: ArrayOps,
    sequences: Array,
    scores: Sequence[Array],
    beam_indices: Array | None = None,
    normalize_logits: bool = False,
) -> Array:
    """(rows, new tokens) scores of the chosen tokens, 0 after the end of a beam.

    `sequences`, `scores` and `beam_indices` are those of an output with `output_scores=True`. `normalize_logits=True`
    first applies log_softmax; the scores of beam search are log-probabilities already.
    """
    if not scores:
        raise ValueError(
            "compute_transition_scores needs scores: generate with return_dict_in_generate=True, output_scores=True"
        )
    rows = int(sequences.shape[0])
    if beam_indices is None:
        if rows != int(scores[0].shape[0]):
            raise ValueError(
                f"there are scores of {int(scores[0].shape[0])} rows for {rows} sequences: beam search's need its "
                "beam_indices"
            )
        row_of = [[row] * len(scores) for row in range(rows)]
    else:
        row_of = ops.to_list(beam_indices)
    steps = max(sum(row >= 0 for row in of) for of in row_of)
    start = int(sequences.shape[1]) - steps
    columns: list[Array] = []
    for step in range(steps):
        scores_rv = ops.log_softmax(scores[step]) if normalize_logits else scores[step]
        of_step = [of[step] for of in row_of]
        scores_bv = ops.take_rows(scores_rv, ops.array([max(row, 0) for row in of_step]))
        chosen_b1 = ops.take_along(scores_bv, sequences[:, start + step : start + step + 1])
        columns.append(ops.where(ops.array([[row >= 0] for row in of_step]), chosen_b1, 0.0))
    return ops.concat(columns)
