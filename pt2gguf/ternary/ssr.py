"""Which columns form the next block: SSR, and the orders that it is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def select_block(W: Tensor, size: int) -> Tensor:
    """Positions of the `size` columns most similar to the mean column (Eq. 15, 16).

    W: (n, r), the remaining columns of the updated weights. Returns (size,) int64, most similar
    first. Similarity is the cosine; as in the authors' release, columns are scaled to unit length
    before their mean is taken. Equal similarities go by position, lowest first.
    """
    norms = torch.linalg.vector_norm(W, dim=0)
    directions = W / torch.where(norms > 0, norms, 1.0)
    similarity = directions.mean(1) @ directions  # the mean's own length does not change the order
    return torch.sort(similarity, descending=True, stable=True).indices[:size]


def fixed_order(reorder_by: str, H: Tensor) -> Tensor:
    """(m,) int64: all columns in an order that does not depend on the weights.

    reorder_by: "hessian", largest diagonal element of H (m, m) first, or "random".
    """
    if reorder_by == "hessian":
        return torch.sort(H.diagonal(), descending=True, stable=True).indices
    if reorder_by == "random":
        return torch.randperm(len(H), generator=torch.Generator().manual_seed(0)).to(H.device)
    raise ValueError(f"{reorder_by!r} is no order of columns: choose similarity, hessian or random")
