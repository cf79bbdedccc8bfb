"""One layer: from weights and input statistics to a ternary weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pt2gguf.errors import Pt2Error
from pt2gguf.replay import Replayed
from pt2gguf.ternary.compensation import (
    BlockFactors,
    asymmetric_target,
    asymmetric_update,
    damped_inverse,
    diagonal_update,
    exact_update,
    split_block,
)
from pt2gguf.ternary.grid import (
    activation_aware_grid,
    grid_values,
    initial_grid,
    iterative_ternary_fitting,
    nonnegative_scale,
    round_to_half,
)
from pt2gguf.ternary.method import Method
from pt2gguf.ternary.rounding import descend_digits, digits_with_feedback
from pt2gguf.ternary.row_feedback import RowStep, all_rows_at_once, row_steps
from pt2gguf.ternary.ssr import fixed_order, select_block
from pt2gguf.ternary.statistics import InputStatistics, OutputStatistics
from pt2gguf.ternary.weight import TernaryWeight


@dataclass(frozen=True)
class TernarizationReport:
    """How one layer went.

    relative_error: tr(E H E^T) / tr(W H W^T) with E = W - Q; 0 where W H W^T is 0.
    damping: the damping that was finally used, as a fraction of H's mean diagonal.
    blocks: blocks of columns.
    itf_rounds: the most rounds that a block needed.
    singular_rows: rows, summed over blocks, that kept their ITF grid because AGA was singular.
    """

    relative_error: float
    damping: float
    blocks: int
    itf_rounds: int
    singular_rows: int


@dataclass(frozen=True)
class _Block:
    alpha: Tensor
    mu: Tensor
    T: Tensor
    error: Tensor
    itf_rounds: int
    singular_rows: int


def ternarize(
    weights: Tensor,
    statistics: InputStatistics,
    method: Method,
    outputs: OutputStatistics | None = None,
) -> tuple[TernaryWeight, TernarizationReport]:
    """Ternarize one matrix.

    weights: (n, m), m a multiple of method.block_size, any float type, on the same device as the
    statistics. outputs: of its n outputs; without, rows are rounded without regard to each other.
    Works in float64 and does not change its arguments. Raises Pt2Error for weights that are not
    finite or too large for float16 scales.
    """
    rows, columns = weights.shape
    size = method.block_size
    if columns % size:
        raise ValueError(f"{columns} columns are no multiple of the block size {size}")
    original = finite_weights(weights)
    H = statistics.hessian
    P, damping = damped_inverse(H, method.damping)
    cross = full_precision_moments(statistics, method)
    steps = steps_of_rows(outputs, rows, method, weights.device)

    wanted = original
    if cross is not None and method.gptaq_upfront:
        wanted = asymmetric_target(wanted, cross, P, method.gptaq)
    remaining = torch.arange(columns, device=weights.device)
    by_similarity = method.ssr and method.reorder_by == "similarity"
    if method.ssr and not by_similarity:
        remaining = fixed_order(method.reorder_by, H)
        wanted, P = wanted[:, remaining], P[remaining.unsqueeze(1), remaining]
    W = wanted  # with what the columns before ask of these
    round_rows = Replayed(partial(_round_rows, method))
    blocks: list[_Block] = []
    order: list[Tensor] = []
    while len(remaining):
        block, rest = _choose_block(W, size, by_similarity)
        factors, P = split_block(P, block, rest)
        W_B, wanted_B = W[:, block], wanted[:, block]
        chosen = remaining[block]
        S = H[chosen.unsqueeze(1), chosen]
        done = _ternarize_block(W_B, W_B - wanted_B, S, factors, method, steps, round_rows)
        blocks.append(done)
        order.append(chosen)

        W, wanted = W[:, rest], wanted[:, rest]
        remaining = remaining[rest]
        if method.gptq:
            W = W + (exact_update if method.exact else diagonal_update)(done.error, factors)
        if cross is not None and not method.gptaq_upfront:
            shift = asymmetric_update(W_B, cross[chosen.unsqueeze(1), remaining], P, method.gptaq)
            W, wanted = W + shift, wanted + shift

    weight = TernaryWeight(
        alpha=torch.stack([b.alpha for b in blocks], dim=1),
        mu=torch.stack([b.mu for b in blocks], dim=1),
        digits=torch.cat([b.T for b in blocks], dim=1).to(torch.int8),
        perm=torch.cat(order) if method.ssr else None,
    )
    report = TernarizationReport(
        relative_error=relative_error(original, weight.dequantize(H.dtype), H),
        damping=damping,
        blocks=len(blocks),
        itf_rounds=max(b.itf_rounds for b in blocks),
        singular_rows=sum(b.singular_rows for b in blocks),
    )
    return weight, report


def finite_weights(weights: Tensor) -> Tensor:
    """The weights in float64. Raises Pt2Error if some are not finite."""
    original = weights.double()
    bad = int((~torch.isfinite(original)).sum())
    if bad:
        raise Pt2Error(f"{bad} weights are NaN or infinite: repair the checkpoint")
    return original


def full_precision_moments(statistics: InputStatistics, method: Method) -> Tensor | None:
    """`InputStatistics.cross`; None if the method does not want it."""
    if method.gptaq == 0:
        return None
    if statistics.cross is None:
        raise ValueError("GPTAQ needs statistics that were collected with full-precision inputs")
    return statistics.cross


def steps_of_rows(
    outputs: OutputStatistics | None, rows: int, method: Method, device: torch.device
) -> list[RowStep]:
    """The steps in which a matrix of so many rows is rounded."""
    if outputs is None:
        return all_rows_at_once(rows, device)
    return row_steps(outputs.matrices(), method.output_damping)


def _choose_block(W: Tensor, size: int, by_similarity: bool) -> tuple[Tensor, Tensor]:
    """Positions of the next block's columns, and of the others in ascending order."""
    if not by_similarity:
        positions = torch.arange(W.shape[1], device=W.device)
        return positions[:size], positions[size:]
    block = select_block(W, size)
    left = torch.ones(W.shape[1], dtype=torch.bool, device=W.device)
    left[block] = False
    return block, left.nonzero().squeeze(1)


def _ternarize_block(
    W: Tensor,
    from_columns: Tensor,
    S: Tensor,
    factors: BlockFactors,
    method: Method,
    steps: Sequence[RowStep],
    round_rows: Replayed,
) -> _Block:
    """Grid and digits of one block W (n, b); S (b, b) is H_BB. alpha and mu come as float16.

    from_columns: the part of W that compensates columns before. Later rows answer for the error
    against the rest: what earlier columns asked of a row is no error of it.
    """
    metric = factors.metric
    alpha, mu, T = initial_grid(W)
    rounds = 0
    if method.itf:
        alpha, mu, T, rounds = iterative_ternary_fitting(W, T)
    # Gathered once: on a GPU, each access by index takes longer than the rounding itself.
    order = torch.cat([step.rows for step in steps])
    sizes = [len(step.rows) for step in steps]
    grids = (given[order].split(sizes) for given in (alpha, mu, T, from_columns))
    targets = W.clone()
    done = []
    for step, step_alpha, step_mu, step_T, step_from_columns in zip(steps, *grids, strict=True):
        rounded = round_rows(
            targets[step.rows],
            step_alpha,
            step_mu,
            step_T,
            metric if method.exact else S,
            metric,
            factors.L,
        )
        done.append(rounded)
        *_, error, _ = rounded
        step.compensate(error - step_from_columns, targets)
    back = order.argsort()
    alpha, mu, T, error, singular = (torch.cat(parts)[back] for parts in zip(*done, strict=True))
    return _Block(
        round_to_half(alpha, "scale"),
        round_to_half(mu, "offset"),
        T,
        error,
        rounds,
        int(singular.sum()),
    )


def _round_rows(
    method: Method,
    W: Tensor,
    alpha: Tensor,
    mu: Tensor,
    T: Tensor,
    metric: Tensor,
    cost: Tensor,
    L: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows W (r, b), from the grid and digits that they have.

    Gives alpha, mu (float64), T, the error against what will be stored, and whether AGA was
    singular.
    """
    singular = torch.zeros(len(W), dtype=torch.bool, device=W.device)
    if method.aga:
        alpha, mu, singular = activation_aware_grid(W, T, metric, alpha, mu)
    if method.feedback:
        T = digits_with_feedback(W, alpha, mu, L)
        if method.aga:
            alpha, mu, singular = activation_aware_grid(W, T, metric, alpha, mu)
    for _ in range(method.descent_sweeps):
        T = descend_digits(W, alpha, mu, T, cost)
        if method.aga:
            alpha, mu, singular = activation_aware_grid(W, T, metric, alpha, mu)
    alpha, T = nonnegative_scale(alpha, T)
    error = W - grid_values(_as_stored(alpha), _as_stored(mu), T)
    return alpha, mu, T, error, singular


def _as_stored(values: Tensor) -> Tensor:
    return values.to(torch.float16).double()


def relative_error(W: Tensor, values: Tensor, H: Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T), E = W - values: the share of the output's energy that is lost.

    W, values: (n, m) of any float type; H: (m, m). 0 where W H W^T is 0.
    """
    W = W.to(H.dtype)
    E = W - values.to(H.dtype)
    energy = ((W @ H) * W).sum()
    return (((E @ H) * E).sum() / energy).item() if energy > 0 else 0.0
