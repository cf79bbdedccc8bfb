"""What takes one Triton kernel on a GPU where PyTorch would take many.

Each has its equal in PyTorch's operations, next to where it is called, for everything else.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch


@lru_cache(maxsize=1)
def kernels_work() -> bool:
    """Whether PyTorch comes with Triton, and that works."""
    try:
        from pt2gguf.kernels.rounding import round_columns

        round_columns(*torch.zeros(3, 1, 1, dtype=torch.float64, device="cuda"))
    # It needs a compiler and Python's headers, and says so in many ways.
    except Exception as error:
        warnings.warn(
            f"converting takes several times as long: Triton fails ({error})", stacklevel=2
        )
        return False
    return True
