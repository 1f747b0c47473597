"""Classifier-free guidance on a table of scores."""

import numpy as np
from fakes import TableModel

TABLE = np.random.default_rng(2).normal(size=(9, 9)) * 2


def log_softmax(scores):
    return scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())


def guided(ids, other, scale):
    positive, negative = log_softmax(TABLE[sum(ids) % 9]), log_softmax(TABLE[sum(other) % 9])
    return negative + scale * (positive - negative)


def test_scores_follow_the_formula_with_negative_prompts():
    model = TableModel(lambda ids: TABLE[sum(ids) % 9])
    out = model.generate(
        [[1, 2], [3, 4]],
        max_new_tokens=5,
        guidance_scale=2.5,
        negative_prompt_ids=[[0, 5, 6], [7, 7, 8]],
        negative_prompt_attention_mask=[[0, 1, 1], [1, 1, 1]],
        return_dict_in_generate=True,
        output_scores=True,
    )
    for row, (ids, other) in enumerate([([1, 2], [5, 6]), ([3, 4], [7, 7, 8])]):
        for step, scores in enumerate(out.scores):
            expected = guided(ids, other, 2.5)
            np.testing.assert_allclose(scores[row], expected, atol=1e-5)  # float32 of magnitude 10
            token = int(out.sequences[row, 2 + step])
            assert token == expected.argmax()
            ids, other = [*ids, token], [*other, token]


def test_the_default_negative_prompt_is_the_last_token():
    model = TableModel(lambda ids: TABLE[sum(ids) % 9])
    options = {"max_new_tokens": 5, "guidance_scale": 3.0}
    expected = model.generate([[4, 2]], negative_prompt_ids=[[2]], **options).tolist()
    assert model.generate([[4, 2]], **options).tolist() == expected
    plain = model.generate([[4, 2]], max_new_tokens=5).tolist()
    assert model.generate([[4, 2]], max_new_tokens=5, guidance_scale=1.0).tolist() == plain


def test_negative_prompts_are_computed_once_for_several_sequences():
    model = TableModel(lambda ids: TABLE[sum(ids) % 9])
    model.generate(
        [[4, 2]], max_new_tokens=3, guidance_scale=2.0, do_sample=True, seed=0, num_return_sequences=3
    )
    prefills = [entry[1] for entry in model.log if entry[0] == "prefill"]
    assert prefills == [[[4, 2]], [[2]]]
    assert model.log.count(("reorder", [0, 0, 0])) == 2
