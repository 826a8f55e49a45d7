"""Scores against their formulas, and properties of all of them."""

from __future__ import annotations

import pytest
import torch

from problems import gathered, inputs, weights
from wanda.scores import SCORES

WHOLE = slice(None)


def test_ria_sums_over_the_whole_matrix() -> None:
    w, x = weights(6, 10), inputs(50, 10)
    score = SCORES.get("ria").prepare(w, gathered(x))
    for i in range(6):
        for j in range(10):
            column, row = sum(abs(w[k, j]) for k in range(6)), sum(abs(w[i, k]) for k in range(10))
            expected = (abs(w[i, j]) / column + abs(w[i, j]) / row) * x[:, j].norm() ** 0.5
            assert float(score(w, WHOLE)[i, j]) == pytest.approx(float(expected), rel=1e-5)
    torch.testing.assert_close(score(w[:, 4:7], slice(4, 7)), score(w, WHOLE)[:, 4:7])


def test_obs_is_the_squared_weight_over_the_squared_factor() -> None:
    w, x = weights(6, 12), inputs(40, 12)
    hessian = 2 * x.double().T @ x.double() / 40
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(12)
    u = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    expected = w.double() ** 2 / u.diagonal() ** 2
    torch.testing.assert_close(
        SCORES.get("obs").prepare(w, gathered(x))(w, WHOLE).double(), expected, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("name", SCORES.names())
def test_scores_are_finite_and_follow_a_permutation_of_the_rows(name: str) -> None:
    w, x = weights(8, 12), inputs(40, 12)
    x[:, 3] = 0
    w[2] = 0
    w[:, 5] = 0
    score, order = SCORES.get(name), torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    scores = score.prepare(w, gathered(x))(w, WHOLE)
    assert scores.dtype == torch.float32 and bool(torch.isfinite(scores).all()) and float(scores.min()) >= 0
    torch.testing.assert_close(score.prepare(w[order], gathered(x))(w[order], WHOLE), scores[order])
    if name != "magnitude":
        assert float(scores[:, 3].max()) == 0  # a dead input matters to none of them
