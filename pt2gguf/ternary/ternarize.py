"""One layer: from weights and input statistics to a ternary weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pt2gguf.errors import Pt2Error
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
from pt2gguf.ternary.rounding import Replayed, descend_digits, digits_with_feedback
from pt2gguf.ternary.ssr import fixed_order, select_block
from pt2gguf.ternary.statistics import InputStatistics
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
    itf_rounds: int
    singular_rows: int


def ternarize(
    weights: Tensor, statistics: InputStatistics, method: Method
) -> tuple[TernaryWeight, TernarizationReport]:
    """Ternarize one matrix.

    weights: (n, m), m a multiple of method.block_size, any float type, on the same device as the
    statistics. Works in float64 and does not change its arguments. Raises Pt2Error for weights
    that are not finite or too large for float16 scales.
    """
    columns = weights.shape[1]
    size = method.block_size
    if columns % size:
        raise ValueError(f"{columns} columns are no multiple of the block size {size}")
    original = weights.double()
    bad = int((~torch.isfinite(original)).sum())
    if bad:
        raise Pt2Error(f"{bad} weights are NaN or infinite: repair the checkpoint")

    H = statistics.hessian
    P, damping = damped_inverse(H, method.damping)
    cross = _cross(statistics, method)

    W = original
    if cross is not None and method.gptaq_upfront:
        W = asymmetric_target(W, cross, P, method.gptaq)
    remaining = torch.arange(columns, device=weights.device)
    by_similarity = method.ssr and method.reorder_by == "similarity"
    if method.ssr and not by_similarity:
        remaining = fixed_order(method.reorder_by, H)
        W, P = W[:, remaining], P[remaining.unsqueeze(1), remaining]
    feedback, descend = Replayed(digits_with_feedback), Replayed(descend_digits)
    blocks: list[_Block] = []
    order: list[Tensor] = []
    while len(remaining):
        block, rest = _choose_block(W, size, by_similarity)
        factors, P = split_block(P, block, rest)
        W_B = W[:, block]
        chosen = remaining[block]
        S = H[chosen.unsqueeze(1), chosen]
        done = _ternarize_block(W_B, S, factors, method, feedback, descend)
        blocks.append(done)
        order.append(chosen)

        W = W[:, rest]
        remaining = remaining[rest]
        if method.gptq:
            E = W_B - grid_values(done.alpha.double(), done.mu.double(), done.T)
            W = W + (exact_update if method.exact else diagonal_update)(E, factors)
        if cross is not None and not method.gptaq_upfront:
            W = W + asymmetric_update(W_B, cross[chosen.unsqueeze(1), remaining], P, method.gptaq)

    weight = TernaryWeight(
        alpha=torch.stack([b.alpha for b in blocks], dim=1),
        mu=torch.stack([b.mu for b in blocks], dim=1),
        digits=torch.cat([b.T for b in blocks], dim=1).to(torch.int8),
        perm=torch.cat(order) if method.ssr else None,
    )
    report = TernarizationReport(
        relative_error=relative_error(original, weight, H),
        damping=damping,
        blocks=len(blocks),
        itf_rounds=max(b.itf_rounds for b in blocks),
        singular_rows=sum(b.singular_rows for b in blocks),
    )
    return weight, report


def _cross(statistics: InputStatistics, method: Method) -> Tensor | None:
    if method.gptaq == 0:
        return None
    if statistics.cross is None:
        raise ValueError("GPTAQ needs statistics that were collected with full-precision inputs")
    return statistics.cross


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
    S: Tensor,
    factors: BlockFactors,
    method: Method,
    feedback: Replayed,
    descend: Replayed,
) -> _Block:
    """Grid and digits of one block W (n, b); S (b, b) is H_BB. alpha and mu come as float16."""
    cost = factors.metric
    metric = cost if method.exact else S
    alpha, mu, T = initial_grid(W)
    rounds = 0
    if method.itf:
        alpha, mu, T, rounds = iterative_ternary_fitting(W, alpha, mu, T)
    singular = torch.zeros(len(W), dtype=torch.bool, device=W.device)
    if method.aga:
        alpha, mu, singular = activation_aware_grid(W, T, metric, alpha, mu)
    if method.feedback:
        T = feedback(W, alpha, mu, factors.L)
        if method.aga:
            alpha, mu, singular = activation_aware_grid(W, T, metric, alpha, mu)
    for _ in range(method.descent_sweeps):
        T = descend(W, alpha, mu, T, cost)
        if method.aga:
            alpha, mu, singular = activation_aware_grid(W, T, metric, alpha, mu)
    alpha, T = nonnegative_scale(alpha, T)
    return _Block(
        round_to_half(alpha, "scale"),
        round_to_half(mu, "offset"),
        T,
        rounds,
        int(singular.sum()),
    )


def relative_error(W: Tensor, weight: TernaryWeight, H: Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T), E = W - Q: the share of the output's energy that is lost.

    W: (n, m) of any float type; H: (m, m). 0 where W H W^T is 0.
    """
    W = W.to(H.dtype)
    E = W - weight.dequantize(H.dtype)
    energy = ((W @ H) * W).sum()
    return (((E @ H) * E).sum() / energy).item() if energy > 0 else 0.0
