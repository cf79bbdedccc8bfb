"""Compensating errors in columns that are still free (GPTQ, GPTAQ, QEP).

Notation: H is the (m, m) Hessian of the layer; R are the remaining columns, B the block taken from
them, and P = (H_RR)^-1. Writing P = U^T U with U upper triangular and B first, the rows of U that
belong to B are [L^T, K] with P_BB = L L^T and K = L^-1 P_BR. These two factors give everything:
the error's propagation, the order inside the block, and the P of the columns after B, which is the
Schur complement P_RR - K^T K. Downdating P so costs O(m^3) over all blocks, for any order of the
columns, even one that is chosen on the way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pt2gguf.errors import Pt2Error

MAX_DAMPING = 100.0


def damped_inverse(H: Tensor, damping: float) -> tuple[Tensor, float]:
    """(H + damping * mean(diag H) * I)^-1, and the damping that was needed.

    H: (m, m). Starts at `damping` and multiplies by ten (from 0: goes on with 0.01) until Cholesky
    succeeds. H = 0 means that nothing is known about the inputs: it counts as the identity. Raises
    Pt2Error for an H that is not finite or that no reasonable damping makes positive definite.
    """
    mean = H.diagonal().mean()
    if not torch.isfinite(mean):
        raise Pt2Error(
            "the Hessian of the layer's inputs is not finite: the calibration inputs overflow; "
            "convert in float32 or on other text"
        )
    if mean <= 0:
        return torch.eye(len(H), dtype=H.dtype, device=H.device), damping
    while damping <= MAX_DAMPING:
        damped = H.clone()
        damped.diagonal().add_(damping * mean)
        L, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(L)
            if torch.isfinite(inverse).all():
                return inverse, damping
        damping = damping * 10 if damping > 0 else 0.01
    raise Pt2Error(
        f"the Hessian of the layer's inputs is not positive definite even with a damping of "
        f"{MAX_DAMPING:g} of its mean diagonal: calibrate on more or other text"
    )


@dataclass(frozen=True)
class BlockFactors:
    """L (b, b) and K (b, r - b) of the block B, see the module's notation."""

    L: Tensor
    K: Tensor

    @property
    def metric(self) -> Tensor:
        """(P_BB)^-1: the cost of the block's error that remains once later columns compensate."""
        return torch.cholesky_inverse(self.L)


def split_block(P: Tensor, block: Tensor, rest: Tensor) -> tuple[BlockFactors, Tensor]:
    """Take the columns `block` out of P (r, r): their factors, and P of the columns `rest`."""
    L = torch.linalg.cholesky(P[block.unsqueeze(1), block])
    K = torch.linalg.solve_triangular(L, P[block.unsqueeze(1), rest], upper=False)
    return BlockFactors(L, K), P[rest.unsqueeze(1), rest].addmm_(K.T, K, alpha=-1)


def exact_update(E: Tensor, factors: BlockFactors) -> Tensor:
    """What to add to the later columns: -E (P_BB)^-1 P_BR, the optimum for the error E = W_B - Q_B.

    E: (n, b). Returns (n, r - b).
    """
    scaled = torch.linalg.solve_triangular(factors.L.T, E, upper=True, left=False)
    # scaled solves scaled @ L^T = E, so scaled @ K = E L^-T L^-1 P_BR.
    return -(scaled @ factors.K)


def diagonal_update(E: Tensor, factors: BlockFactors) -> Tensor:
    """As `exact_update`, but with only the diagonal of L: what the authors' release does."""
    return -((E / factors.L.diagonal()) @ factors.K)


def asymmetric_update(W_B: Tensor, cross: Tensor, P_rest: Tensor, weight: float) -> Tensor:
    """GPTAQ's term, to be added to the later columns: weight * W_B (dX_B X_R^T) (H_RR)^-1.

    W_B: (n, b), the block's weights; cross: (b, r - b), dX_B X_R^T where dX is the full-precision
    inputs minus the quantized ones; P_rest: (r - b, r - b). It makes the later columns reproduce
    what the block would have given on the full-precision inputs.
    """
    return weight * (W_B @ (cross @ P_rest))


def asymmetric_target(W: Tensor, cross: Tensor, P: Tensor, weight: float) -> Tensor:
    """GPTAQ's term for all columns at once: W + weight * W (dX X^T) H^-1.

    W: (n, m); cross: (m, m), dX X^T; P: (m, m), H^-1. At weight 1 these are the weights whose
    outputs on the quantized inputs X come closest to W's on the full-precision ones ("QEP", Arai
    and Ichikawa 2025); less guards against fitting the calibration text. Applied before any column
    is quantized, it also corrects the first columns, which `asymmetric_update` cannot reach.
    """
    return W + weight * (W @ cross @ P)
