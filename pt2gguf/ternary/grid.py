"""The grid {mu - alpha, mu, mu + alpha} of every row of one block, and the digits on it.

Shapes in this module: W and T are (n, b), float64, T holding -1, 0 or 1; alpha and mu are (n,),
float64; a metric S is (b, b), symmetric positive semidefinite. The error of a row under S is
(w - q) S (w - q)^T with q = alpha * t + mu.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pt2gguf.errors import Pt2Error

MAX_ITF_ROUNDS = 100
# The squared sine of the angle between T's row and the row of ones below which a 2x2 system is
# treated as singular: far above float64's rounding, far below what any row of 128 digits gives.
SINGULAR = 1e-10


def initial_grid(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric initialisation (Eq. 4, 5): alpha, mu and T.

    mu is the row's mean; T keeps the sign of W - mu where |W - mu| exceeds 0.75 of its mean; alpha
    is the least-squares scale of that T.
    """
    mu = W.mean(1)
    centred = W - mu.unsqueeze(1)
    distance = centred.abs()
    threshold = 0.75 * distance.mean(1, keepdim=True)
    T = torch.where(distance > threshold, centred.sign(), 0.0)
    alpha = (T * centred).sum(1) / T.abs().sum(1).clamp(min=1)
    return alpha, mu, T


def nearest_digits(W: Tensor, alpha: Tensor, mu: Tensor) -> Tensor:
    """T whose grid value is nearest to each weight (Eq. 9); 0 throughout where alpha is 0."""
    flat = (alpha == 0).unsqueeze(1)
    scaled = (W - mu.unsqueeze(1)) / torch.where(flat, 1.0, alpha.unsqueeze(1))
    return torch.where(flat, 0.0, scaled.round().clamp(-1, 1))


def fit_grid(W: Tensor, T: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and mu of least squared error for a given T (Eq. 10).

    A row whose digits are all equal determines only the sum alpha * t + mu: it gets alpha = 0 and
    mu = mean.
    """
    columns = W.shape[1]
    mean = W.mean(1)
    digit_sum = T.sum(1)
    determinant = columns * T.square().sum(1) - digit_sum.square()  # an integer: exact
    # W is centred, so its own sum drops out of the normal equations.
    alpha = columns * (T * (W - mean.unsqueeze(1))).sum(1) / determinant.clamp(min=1)
    alpha = torch.where(determinant > 0, alpha, 0.0)
    return alpha, mean - alpha * digit_sum / columns


def iterative_ternary_fitting(W: Tensor, T: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """ITF (Eq. 9, 10): fit the grid, round to it, until T stops changing. Gives alpha, mu, T, and
    how many rounds it took.

    Neither step can raise a row's squared error. Rows that have settled are left out of the
    following rounds, and put together at the end: writing them to their places in each round would
    take most of the time on a GPU.
    """
    settled: list[tuple[Tensor, ...]] = []
    rows = torch.arange(len(W), device=W.device)
    rounds = 0
    while len(rows):
        alpha, mu = fit_grid(W, T)
        before, T = T, nearest_digits(W, alpha, mu)
        moves = (before != T).any(1)
        rounds += 1
        if rounds == MAX_ITF_ROUNDS:
            moves[:] = False
        stays = (~moves).nonzero().squeeze(1)
        settled.append((rows[stays], alpha[stays], mu[stays], T[stays]))
        moving = moves.nonzero().squeeze(1)
        rows, W, T = rows[moving], W[moving], T[moving]
    rows, alpha, mu, T = (torch.cat(parts) for parts in zip(*settled, strict=True))
    back = rows.argsort()
    return alpha[back], mu[back], T[back], rounds


def activation_aware_grid(
    W: Tensor, T: Tensor, S: Tensor, alpha: Tensor, mu: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """AGA (Eq. 12, 13): alpha and mu of least error under the metric S, with T frozen.

    Rows whose 2x2 system is singular keep the given alpha and mu; the third result, (n,) bool,
    marks them.
    """
    TS = T @ S
    tt = (TS * T).sum(1)
    t1 = TS.sum(1)
    one_one = S.sum()
    tw = (TS * W).sum(1)
    one_w = W @ S.sum(0)
    determinant = tt * one_one - t1.square()
    singular = ~(determinant > SINGULAR * tt * one_one)
    safe = torch.where(singular, 1.0, determinant)
    fitted_alpha = (one_one * tw - t1 * one_w) / safe
    fitted_mu = (tt * one_w - t1 * tw) / safe
    return (
        torch.where(singular, alpha, fitted_alpha),
        torch.where(singular, mu, fitted_mu),
        singular,
    )


def nonnegative_scale(alpha: Tensor, T: Tensor) -> tuple[Tensor, Tensor]:
    """The same values with alpha >= 0: (-alpha, -T) describes the same row as (alpha, T)."""
    return alpha.abs(), torch.where((alpha < 0).unsqueeze(1), -T, T)


def round_to_half(values: Tensor, what: str) -> Tensor:
    """`values` as float16; an error where float16 cannot hold one, naming it as `what`."""
    half = values.to(torch.float16)
    if not torch.isfinite(half).all():
        worst = values[torch.isfinite(values)].abs().max().item()
        raise Pt2Error(
            f"a block's {what} of {worst:.6g} does not fit float16 (largest 65504): the weights "
            "are too large to be ternarized; keep this tensor in a stock type"
        )
    return half


def grid_values(alpha: Tensor, mu: Tensor, T: Tensor) -> Tensor:
    """(n, b): alpha * T + mu."""
    return alpha.unsqueeze(1) * T + mu.unsqueeze(1)
