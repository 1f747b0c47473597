"""Calls of every array operation of `generation`, with NumPy inputs, against which each backend is compared."""

import numpy as np

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 40)).astype(np.float32)
INDEX = RNG.permuted(np.tile(np.arange(40), (3, 1)), axis=1)[:, :5]
VALUES = RNG.normal(size=(3, 5)).astype(np.float32)
B = X > 0

CALLS = [
    ("argmax", X),
    ("softmax", X),
    ("log_softmax", X),
    ("exp", X),
    ("abs", X),
    ("max", X),
    ("sum", X),
    ("sum", B),
    ("cumsum", X),
    ("all", B),
    ("all", X > -9),
    ("sort", X),
    ("top_k", X, 7),
    ("take_along", X, INDEX),
    ("put_along", X, INDEX, VALUES),
    ("put_along", X, INDEX, 2.5),
    ("put_along", B, INDEX, True),
    ("add_along", X, INDEX[:, [0, 1, 1, 2, 0]], VALUES),
    ("fill_columns", X, np.array([0, 39, 7]), -np.inf),
    ("where", B, X, 0.0),
    ("where", B, -np.inf, X),
    ("where", B, X, -X),
    ("full_like", X, -np.inf),
    ("mask", 2, 3),
    ("take_rows", X, np.array([2, 2, 0, 1])),
    ("reshape", X, (2, 60)),
    ("log", np.abs(X)),
    ("concat", [X, X[:, :1]]),
    ("array", [[1, 2], [3, 4]]),
    ("array", [[1.5]]),
    ("array", [[True, False]]),
    ("array", np.array([1, 2], dtype=np.int32)),
]
