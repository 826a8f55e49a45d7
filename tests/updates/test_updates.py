"""Updates against independent float64 forms, and properties of every one of them."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from problems import PATTERNS, gathered, inputs, weights
from wanda.composition import Composition, faults
from wanda.kernels.native import multiplies_bfloat16
from wanda.patterns import NM, Unstructured, Variant, exact
from wanda.statistics import Needs, Statistics
from wanda.updates import UPDATES

CHAINS = [*UPDATES.names(), "swap+pcg", "admm-iterative+pcg", "obs+admm", "swap+obs-sequential"]
HALF = Unstructured(Fraction(1, 2))


def scored(update: str, score: str = "wanda") -> str | None:
    return None if UPDATES.get(update.split("+")[0]).owns_mask else score


def group_text(pattern: object) -> str | None:
    group = getattr(pattern, "group", None)
    return f"block:{group}" if isinstance(group, int) else group


def pruned(update: str, w: Tensor, statistics: Statistics, pattern=HALF, score: str = "wanda", inherit: float = 0.0):
    return Composition(scored(update, score), update, inherit).prune(w, statistics, pattern, "a matrix")


def fits(update: str, pattern: object) -> bool:
    group = None if isinstance(pattern, (NM, Variant)) else group_text(pattern)
    text = pattern.text if isinstance(pattern, NM) else None
    return not faults(
        score=scored(update), update=update, group=group, pattern=text, variant=isinstance(pattern, Variant)
    )


def loss(b: Tensor, w: Tensor, gram: Tensor, beyond: Tensor | float = 0.0) -> Tensor:
    """Squared error to the target but for a constant, per row, in float64: [out]."""
    d = b.double() - w.double()
    return (d @ gram.double() * d).sum(dim=1) - 2 * (d * beyond).sum(dim=1)


# --- every update ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("update", CHAINS)
def test_counts_zeros_errors_and_determinism(update: str, name: str) -> None:
    pattern = PATTERNS[name]
    if not fits(update, pattern):
        assert update.startswith("swap") and name in ("column", "block")
        return
    w, x = weights(48, 160), inputs(400, 160)
    kept = w.clone()
    result = pruned(update, w, gathered(x), pattern)
    assert torch.equal(w, kept)
    assert int((~result.mask).sum()) == pattern.removed(48, 160)
    if isinstance(pattern, NM):
        assert bool((result.mask.view(48, -1, pattern.m).sum(dim=2) == pattern.n).all())
    if name in ("row", "row of 0.29"):
        assert (~result.mask).sum(dim=1).tolist() == [int(160 * pattern.sparsity)] * 48
    assert torch.equal(result.weight != 0, result.mask)
    again = pruned(update, w, gathered(x), pattern)
    assert torch.equal(again.weight, result.weight) and torch.equal(again.mask, result.mask)
    masked = ((x.double() @ (w - w * result.mask).double().T) ** 2).sum()
    updated = ((x.double() @ (w - result.weight).double().T) ** 2).sum()
    whole = ((x.double() @ w.double().T) ** 2).sum()
    assert float(updated) <= float(masked) * (1 + 1e-6)
    assert result.error is not None and result.error.exact
    assert result.error.relative == pytest.approx(float(updated / whole), rel=1e-3)


@pytest.mark.parametrize("pattern", [HALF, NM(2, 4)], ids=["row", "2:4"])
@pytest.mark.parametrize("update", CHAINS)
def test_rows_are_solved_by_themselves(update: str, pattern: Unstructured | NM) -> None:
    w, x = weights(20, 64), inputs(200, 64)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(4))
    straight, permuted = pruned(update, w, gathered(x), pattern), pruned(update, w[order], gathered(x), pattern)
    assert float((straight.mask[order] == permuted.mask).float().mean()) > 0.999
    same = (straight.mask[order] == permuted.mask).all(dim=1)
    torch.testing.assert_close(straight.weight[order][same], permuted.weight[same], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("inherit", [0.0, 0.5])
@pytest.mark.parametrize("update", CHAINS)
def test_dead_inputs_and_bfloat16_weights(update: str, inherit: float) -> None:
    w, x = weights(24, 64).bfloat16().float(), inputs(300, 64).bfloat16()
    x[:, [0, 17, 63]] = 0
    dense = (x + 0.1 * inputs(300, 64, seed=8)).bfloat16() if inherit else None
    for pattern in (HALF, NM(2, 4), Unstructured(Fraction(1, 2), "layer")):
        if inherit and not UPDATES.get(update.split("+")[-1]).solves:
            continue
        result = pruned(update, w, gathered(x, dense), pattern, inherit=inherit)
        assert bool(torch.isfinite(result.weight).all())
        assert int((~result.mask).sum()) == pattern.removed(24, 64)
        assert float(result.weight[~result.mask].abs().sum()) == 0
        assert not result.notes
        if pattern == HALF and not UPDATES.get(update.split("+")[0]).owns_mask:
            assert not bool(result.mask[:, [0, 17, 63]].any())


@pytest.mark.parametrize("update", CHAINS)
def test_no_live_input_at_all(update: str) -> None:
    result = pruned(update, weights(4, 16), gathered(torch.zeros(30, 16)))
    assert bool(torch.isfinite(result.weight).all()) and int(result.mask.sum()) == 4 * 8


@pytest.mark.parametrize("update", [u for u in CHAINS if UPDATES.get(u.split("+")[-1]).solves])
def test_a_gram_matrix_that_is_not_positive_definite_raises_the_damping_and_says_so(update: str) -> None:
    statistics = gathered(inputs(300, 32))
    for j in range(0, 32, 2):  # "correlations" of 4
        both = 4 * float(statistics.square_sum[j] * statistics.square_sum[j + 1]) ** 0.5
        statistics.gram[j, j + 1] = statistics.gram[j + 1, j] = both
    result = pruned(update, weights(8, 32), statistics)
    assert bool(torch.isfinite(result.weight).all()) and int(result.mask.sum()) == 8 * 16
    if update != "swap":  # which inverts nothing
        assert any("not positive definite" in note and "damping raised" in note for note in result.notes)


# --- errors inherited from earlier layers ---------------------------------------------------------------------------


@pytest.mark.parametrize("a", [0.5, 1.0])
@pytest.mark.parametrize("update", [u for u in CHAINS if UPDATES.get(u.split("+")[-1]).solves])
def test_inherited_errors_are_repaired(update: str, a: float) -> None:
    w, x = weights(24, 64), inputs(500, 64)
    dense = x + 0.5 * inputs(500, 64, seed=5)
    target = (a * dense + (1 - a) * x).double() @ w.double().T
    blind = pruned(update, w, gathered(x)).weight
    repaired = pruned(update, w, gathered(x, dense), inherit=a).weight
    error = lambda b, target: float(((x.double() @ b.double().T - target) ** 2).sum())  # noqa: E731
    assert error(repaired, target) < error(blind, target)


def test_inputs_without_a_dense_counterpart_are_named() -> None:
    result = pruned("pcg", weights(4, 16), gathered(inputs(100, 16)), inherit=0.5)
    assert any("not repaired" in note for note in result.notes)


# --- one by one -----------------------------------------------------------------------------------------------------


def column_by_column(
    w: Tensor, x: Tensor, sparsity: float | None, nm: tuple[int, int] | None, mask: Tensor | None = None
):
    """SparseGPT in float64, plainly: every column's error is pushed onto all later columns at once."""
    w, x = w.double().clone(), x.double()
    out, width = w.shape
    hessian = 2 * x.T @ x / x.shape[0]
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(width)
    u = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    keep = torch.ones(out, width, dtype=torch.bool) if mask is None else mask.clone()
    for j in range(width):
        if sparsity is not None and j % 128 == 0:
            part = slice(j, min(j + 128, width))
            scores = (w[:, part] ** 2 / u.diagonal()[part] ** 2).flatten()
            chosen = torch.ones(scores.numel(), dtype=torch.bool)
            chosen[scores.argsort()[: int(scores.numel() * sparsity)]] = False
            keep[:, part] = chosen.view(out, -1)
        if nm is not None and j % nm[1] == 0:
            scores = w[:, j : j + nm[1]] ** 2 / u.diagonal()[j : j + nm[1]] ** 2
            keep[:, j : j + nm[1]].scatter_(1, scores.argsort(dim=1)[:, : nm[1] - nm[0]], False)
        error = torch.where(keep[:, j], 0, w[:, j] / u[j, j])
        w[:, j:] -= error[:, None] * u[j, j:]
        w[:, j] = torch.where(keep[:, j], w[:, j], 0)
    return w * keep, keep


@pytest.mark.parametrize("nm", [None, (2, 4), (3, 8)])
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_obs_is_sparsegpt(nm: tuple[int, int] | None, sparsity: float) -> None:
    w, x = weights(192, 300 if nm is None else 320), inputs(1500, 300 if nm is None else 320)
    pattern = Unstructured(Fraction(str(sparsity)), 128) if nm is None else NM(*nm)
    ours = pruned("obs", w, gathered(x), pattern, "obs")
    theirs, mask = column_by_column(w, x, sparsity if nm is None else None, nm)
    assert float((ours.mask == mask).float().mean()) > 0.999
    error = lambda b: float(((x.double() @ (w - b).double().T) ** 2).sum())  # noqa: E731
    assert error(ours.weight) == pytest.approx(error(theirs), rel=0.01)


def test_obs_sequential_sweeps_under_a_mask_fixed_before() -> None:
    w, x = weights(40, 150), inputs(800, 150)
    ours = pruned("obs-sequential", w, gathered(x), HALF)
    assert torch.equal(ours.mask, HALF.mask(w.abs() * x.norm(dim=0)))
    expected, _ = column_by_column(w, x, None, None, ours.mask)
    torch.testing.assert_close(ours.weight.double(), expected, rtol=1e-3, atol=1e-3)


def test_pcg_is_the_textbook_iteration() -> None:
    w, x = weights(10, 40), inputs(300, 40)
    ours = pruned("pcg", w, gathered(x))
    gram = x.double().T @ x.double()
    gram += 0.01 * gram.diagonal().mean() * torch.eye(40)
    for row in range(10):
        m = ours.mask[row].double()
        b = w[row].double() * m
        r = ((w[row] - b) @ gram) * m
        z = r / gram.diagonal()
        p = z
        for _ in range(10):
            q = (p @ gram) * m
            length = (r @ z) / (p @ q)
            b, r, before = b + length * p, r - length * q, r @ z
            z = r / gram.diagonal()
            p = z + (r @ z) / before * p
        torch.testing.assert_close(ours.weight[row].double(), b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("width", "sparsity"), [(8, "0.8"), (16, "0.9"), (64, "0.97")])
@pytest.mark.parametrize("seed", range(4))
def test_pcg_knows_a_row_that_has_converged(width: int, sparsity: str, seed: int) -> None:
    """With so few survivors a row is solved before ten steps; what is left is rounding, not negative curvature."""
    x, w = inputs(500, width, seed=seed), weights(40, width, seed=seed)
    ours = pruned("pcg", w, gathered(x), Unstructured(exact(sparsity)))
    assert ours.notes == []
    gram = (x.T @ x).double()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    for row, mask, found in zip(w.double(), ours.mask, ours.weight, strict=True):
        expected = torch.linalg.solve(damped[mask][:, mask], damped[mask] @ row)
        torch.testing.assert_close(found[mask].double(), expected, rtol=1e-3, atol=1e-4)


def test_more_pcg_steps_reach_the_least_squares_solution_that_ten_come_near() -> None:
    w, x = weights(10, 40), inputs(300, 40)
    ours = pruned("pcg", w, gathered(x))
    gram = x.double().T @ x.double()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(40)
    best = torch.zeros(10, 40, dtype=torch.float64)
    for row in range(10):
        on = ours.mask[row]
        best[row, on] = torch.linalg.solve(damped[on][:, on], (w[row].double() @ damped)[on])
    masked, least = loss(w * ours.mask, w, damped), loss(best, w, damped)
    reached = (masked - loss(ours.weight, w, damped)) / (masked - least)
    assert float(reached.min()) > 0.99


def admm_plainly(w: Tensor, x: Tensor, choose, relaxation: float = 1.0, dense: Tensor | None = None) -> Tensor:
    """Boza's ADMM as the paper has it, float64, with Boyd's over-relaxation; choose: (step, |V + U|) -> mask or None.

    dense: inputs whose outputs are aimed at half way.
    """
    gram = x.double().T @ x.double()
    n = gram.diagonal().sqrt() + 1e-8
    h = gram / (n[:, None] * n[None])
    h += 0.1 * h.diagonal().mean() * torch.eye(h.shape[0])
    inverse = torch.linalg.inv(h + torch.eye(h.shape[0]))
    scaled = w.double() * n
    target = scaled @ h
    if dense is not None:
        target += 0.5 * w.double() @ (dense - x).double().T @ x.double() / n
    v, u, mask = scaled, torch.zeros_like(scaled), None
    for step in range(20):
        chosen = choose(step, (v + u).abs())
        mask = mask if chosen is None else chosen
        z = (v + u) * mask
        u = u + v - z
        v = relaxation * (target + z - u) @ inverse + (1 - relaxation) * z
    return (v + u) * mask / n


def test_admm_under_a_fixed_mask() -> None:
    w, x = weights(30, 60), inputs(400, 60)
    ours = pruned("admm", w, gathered(x))
    torch.testing.assert_close(ours.weight.double(), admm_plainly(w, x, lambda *_: ours.mask), rtol=1e-3, atol=1e-4)


def rising_plainly(w: Tensor, steps: int, nm: bool):
    """choose for admm_plainly: half of every row, or 2:4, reached cubically."""

    def choose(step: int, scores: Tensor) -> Tensor | None:
        if step >= steps:
            return None
        share = 0.5 - 0.5 * (1 - (step + 1) / steps) ** 3
        if nm:
            scores = scores.clone().view(len(w), -1, 4)
            scores.scatter_(2, scores.topk(2, dim=2).indices, float("inf"))
            scores = scores.view(w.shape)
        mask = torch.ones(w.shape, dtype=torch.bool)
        return mask.scatter_(1, scores.argsort(dim=1)[:, : int(w.shape[1] * share + 1e-9)], False)

    return choose


@pytest.mark.parametrize("nm", [False, True])
def test_admm_iterative_raises_the_sparsity_cubically(nm: bool) -> None:
    w, x = weights(30, 64), inputs(400, 64)
    ours = pruned("admm-iterative", w, gathered(x), NM(2, 4) if nm else HALF)
    expected = admm_plainly(w, x, rising_plainly(w, 15, nm))
    assert float(((expected != 0) == ours.mask).float().mean()) > 0.999
    assert float((ours.weight - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("reduced", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("inherit", [0.0, 0.5])
@pytest.mark.parametrize("nm", [False, True])
def test_admm_relaxed_is_over_relaxed(nm: bool, inherit: float, reduced: bool, monkeypatch) -> None:
    w, x = weights(300, 64), inputs(400, 64)  # more rows than a panel
    dense = x + 0.3 * inputs(400, 64, seed=5) if inherit else None
    if reduced and not multiplies_bfloat16():
        pytest.skip("products in bfloat16 are taken with AVX-512 BF16 only")
    if not reduced:
        monkeypatch.setattr("wanda.updates._admm.multiplies_bfloat16", lambda: False)
    ours = pruned("admm-relaxed", w, gathered(x, dense), NM(2, 4) if nm else HALF, inherit=inherit)
    expected = admm_plainly(w, x, rising_plainly(w, 18, nm), 1.6, dense)
    assert float(((expected != 0) == ours.mask).float().mean()) > (0.98 if reduced else 0.999)
    assert float((ours.weight - expected).norm() / expected.norm()) < (0.1 if reduced else 0.02)
    gram = x.double().T @ x.double()
    beyond = 0.5 * w.double() @ (dense - x).double().T @ x.double() if dense is not None else 0.0
    zero = loss(torch.zeros_like(w), w, gram, beyond).sum()
    assert float(loss(ours.weight, w, gram, beyond).sum() - loss(expected, w, gram, beyond).sum()) < 1e-3 * float(zero)


@pytest.mark.parametrize("pattern", [HALF, NM(2, 4)], ids=["row", "2:4"])
@pytest.mark.parametrize("inherit", [0.0, 0.5])
def test_swap_stops_where_no_swap_helps(pattern: Unstructured | NM, inherit: float) -> None:
    w, x = weights(5, 16), inputs(60, 16)
    dense = x + 0.3 * inputs(60, 16, seed=5)
    statistics = gathered(x, dense) if inherit else gathered(x)
    result = pruned("swap", w, statistics, pattern, inherit=inherit)
    beyond = inherit * w.double() @ statistics.lag.double() if inherit else torch.zeros(5, 16).double()
    start = pattern.mask(w.abs() * x.norm(dim=0))
    before, after = (loss(w * m, w, statistics.gram, beyond) for m in (start, result.mask))
    assert bool((after <= before + 1e-6).all()) and float(after.sum()) < float(before.sum())
    removed = w.double() * ~result.mask
    c = removed @ statistics.gram.double() + beyond
    for row in range(5):
        changes = {}
        for u in torch.where(result.mask[row])[0].tolist():
            for v in torch.where(~result.mask[row])[0].tolist():
                if isinstance(pattern, NM) and u // 4 != v // 4:
                    continue
                other = result.mask[row].clone()
                other[u], other[v] = False, True
                brute = float(loss((w[row] * other)[None], w[row : row + 1], statistics.gram, beyond[row : row + 1]))
                wu, wv, g = float(w[row, u]), float(w[row, v]), statistics.gram.double()
                formula = 2 * wu * c[row, u] + wu**2 * g[u, u] - 2 * wv * c[row, v] + wv**2 * g[v, v]
                formula = float(formula - 2 * wu * wv * g[u, v])
                assert brute - float(after[row]) == pytest.approx(formula, abs=1e-6 * float(before.sum()))
                changes[u, v] = formula
        prune = {u: float(2 * w[row, u] * c[row, u] + w[row, u] ** 2 * g[u, u]) for u, _ in changes}
        restore = {v: float(-2 * w[row, v] * c[row, v] + w[row, v] ** 2 * g[v, v]) for _, v in changes}
        u1, v1 = min(prune, key=prune.__getitem__), min(restore, key=restore.__getitem__)
        looked_at = (
            changes if isinstance(pattern, NM) else {p: d for p, d in changes.items() if u1 == p[0] or v1 == p[1]}
        )
        assert min(looked_at.values()) > -1e-4 * float(after[row].abs())


def test_only_needed_statistics() -> None:
    w = weights(6, 8)
    result = Composition("magnitude").prune(w, Statistics(8, Needs.NOTHING), HALF, "m")
    assert torch.equal(result.mask, HALF.mask(w.abs())) and result.error is None
    assert torch.equal(result.weight[result.mask], w[result.mask])
