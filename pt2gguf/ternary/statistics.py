"""Second moments of a layer's calibration inputs, and of the gradients at its outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class NonFiniteInputs(Exception):  # noqa: N818 - names what was found, not a failure of ours
    """Calibration inputs that are NaN or infinite, or whose squares overflow float32.

    count: how many.
    """

    def __init__(self, count: int) -> None:
        super().__init__(f"{count} calibration inputs are not finite or overflow when squared")
        self.count = count


def second_moments(x: Tensor) -> Tensor:
    """x^T x (m, m) in x's type, for x (tokens, m); little more than the half of it is computed."""
    columns = x.shape[1]
    # Smaller products are less efficient; on a GPU they take longer to launch than to run.
    size = max(4096 if x.is_cuda else 256, -(-columns // 8))
    result = x.new_empty(columns, columns)
    for begin in range(0, columns, size):
        end = min(begin + size, columns)
        below = x[:, begin:].T @ x[:, begin:end]
        result[begin:, begin:end] = below
        result[begin:end, end:] = below[end - begin :].T
    return result


class InputStatistics:
    """Accumulates x x^T over calibration tokens: float32 products, summed in float64."""

    def __init__(self, columns: int, device: torch.device | str, with_full_precision: bool) -> None:
        """columns: the length m of an input; with_full_precision: collect `cross` as well."""
        self.tokens = 0
        self._products = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self._cross = torch.zeros_like(self._products) if with_full_precision else None

    def add(self, x: Tensor, x_full: Tensor | None = None) -> None:
        """Count a batch of inputs.

        x: (tokens, m), inputs from the quantized part of the model, any float type.
        x_full: the same tokens' inputs in the full-precision model; needed exactly when this
            object was made `with_full_precision`.

        Raises NonFiniteInputs, without counting the batch.
        """
        if (x_full is None) != (self._cross is None):
            raise ValueError("x_full must be given exactly when with_full_precision was set")
        x = x.float()
        products = second_moments(x)
        finite = torch.isfinite(products).all()
        if x_full is not None:
            x_full = x_full.float()
            cross = (x_full - x).T @ x
            finite &= torch.isfinite(cross).all()
        if not finite:
            inputs = [x] if x_full is None else [x, x_full]
            raise NonFiniteInputs(sum(int((~torch.isfinite(v * v)).sum()) for v in inputs))
        self._products += products
        if self._cross is not None:
            self._cross += cross
        self.tokens += len(x)

    @property
    def hessian(self) -> Tensor:
        """(m, m) float64: 2 / tokens * sum x x^T."""
        return self._products * (2 / max(self.tokens, 1))

    @property
    def cross(self) -> Tensor | None:
        """(m, m) float64: 2 / tokens * sum (x_full - x) x^T; None without full precision."""
        return None if self._cross is None else self._cross * (2 / max(self.tokens, 1))


# Rows of a part: a matrix of second moments is of use while there are several times as many tokens.
PART_ROWS = 2048


class OutputStatistics:
    """Accumulates g g^T over calibration tokens, for one part of the outputs after the other."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        """parts: the sums so far, (r, r) float32 for each part."""
        self.parts = parts

    @staticmethod
    def empty(rows: int, device: torch.device | str) -> OutputStatistics:
        """For `rows` outputs, in parts as large as each other, PART_ROWS at the most."""
        count = -(-rows // PART_ROWS)
        sizes = [len(part) for part in torch.arange(rows).tensor_split(count)]
        return OutputStatistics([torch.zeros(size, size, device=device) for size in sizes])

    def add(self, gradients: Tensor) -> None:
        """Count a batch: (tokens, n), whose products are taken in its type.

        That may be bfloat16: what signs are drawn moves them by more than its rounding.
        """
        sizes = [len(part) for part in self.parts]
        for part, g in zip(self.parts, gradients.split(sizes, dim=1), strict=True):
            part += second_moments(g)

    def matrices(self) -> list[Tensor]:
        """The sums, float64; their scale means nothing."""
        return [part.double() for part in self.parts]


def output_bytes(rows: int) -> int:
    """At most, of an OutputStatistics for `rows` outputs."""
    return 4 * rows * min(rows, PART_ROWS)
