"""Drawing the summaries of weight matrices, one below the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pt2gguf.blocks import BLOCK_SIZE
from pt2gguf.errors import Pt2Error
from pt2gguf.export.output import complete_file
from pt2gguf.plotting.summary import MatrixSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg", ".pdf")
WIDTH, HEIGHT_EACH = 10.0, 3.2  # inches
DPI = 150

# Okabe and Ito's palette, which colour-blind readers can tell apart.
GREY, BLUE, GREEN, VERMILION = "#999999", "#0072B2", "#009E73", "#D55E00"


def require_drawable(output: Path) -> None:
    """Raises Pt2Error unless `output` names a format of `FORMATS` and matplotlib is there."""
    if output.suffix.lower() not in FORMATS:
        raise Pt2Error(
            f"{output} does not say what to draw: give it a name that ends in {', '.join(FORMATS)}"
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise Pt2Error(
            "pictures need matplotlib, which is not installed: pip install 'pt2gguf[plot]'"
        ) from None


def write_picture(matrices: Sequence[MatrixSummary], output: Path) -> None:
    """Draws `matrices` into the file `output`, replacing it; its suffix is one of `FORMATS`.

    For each matrix: left, the distribution of its weights and of its ternary values; right, the
    variance of its blocks before and after reordering (the paper's Figure 3, right). Raises
    Pt2Error if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT_EACH * len(matrices)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(matrices), 2, squeeze=False, gridspec_kw={"wspace": 0.06})
    for (left, right), matrix in zip(rows, matrices, strict=True):
        _draw_distribution(left, matrix)
        _draw_variances(right, matrix)
    with complete_file(output) as part:
        figure.savefig(part, format=output.suffix.lower().removeprefix("."))


def _draw_distribution(axes: Axes, matrix: MatrixSummary) -> None:
    axes.set_title(matrix.name, loc="left", fontsize="medium", fontweight="bold")
    axes.stairs(matrix.weights, matrix.edges, fill=True, color=GREY, alpha=0.55, label="weights")
    if matrix.deviation > 0:
        axes.plot(
            *_gaussian(matrix),
            color="black",
            linewidth=1,
            linestyle=":",
            label=r"Gaussian, same $\sigma$",
        )
    if matrix.levels is not None:
        # They differ in line style too, for prints without colour.
        styles = ((-1, BLUE, "-"), (0, GREEN, "--"), (1, VERMILION, "-"))
        for counts, (digit, colour, style) in zip(matrix.levels, styles, strict=True):
            axes.stairs(
                counts,
                matrix.edges,
                color=colour,
                linewidth=1.3,
                linestyle=style,
                label=rf"$\alpha T + \mu$, $T = {digit}$",
            )
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7, top=matrix.weights.max() * 30)  # room for the legend
    axes.set_xlim(matrix.edges[0], matrix.edges[-1])
    axes.locator_params(axis="x", nbins=7)
    axes.set_xlabel("weight")
    axes.set_ylabel("count per bin")
    axes.text(
        0.015,
        0.97,
        "\n".join(
            (
                rf"${matrix.shape[0]} \times {matrix.shape[1]}$",
                rf"$\sigma$ = {matrix.deviation:.3g}",
                f"excess kurtosis {matrix.kurtosis:.2f}",
                rf"farthest from mean: {matrix.largest:.1f} $\sigma$",
            )
        ),
        transform=axes.transAxes,
        va="top",
        fontsize="x-small",
    )
    axes.legend(loc="upper right", fontsize="x-small", frameon=False)
    _tidy(axes)


def _draw_variances(axes: Axes, matrix: MatrixSummary) -> None:
    from matplotlib.ticker import MaxNLocator

    order = "stored order (SSR)" if matrix.stored_order else "SSR of the weights alone"
    blocks = np.arange(1, len(matrix.natural) + 1)
    for values, label, colour, marker in (
        (matrix.natural, "natural order", BLUE, "o"),
        (matrix.reordered, order, VERMILION, "s"),
    ):
        axes.plot(
            blocks,
            values,
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1,
            label=f"{label}, mean {values.mean():.4g}",
        )
    axes.set_ylim(0, 1.35 * max(matrix.natural.max(), matrix.reordered.max()) or 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(f"block of {BLOCK_SIZE} columns")
    axes.set_ylabel("variance within a row")
    axes.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)
    axes.legend(loc="upper right", fontsize="x-small", frameon=False)
    _tidy(axes)


def _gaussian(matrix: MatrixSummary) -> tuple[Any, Any]:
    """The counts that Gaussian weights of the same mean and deviation would have."""
    x = np.linspace(matrix.edges[0], matrix.edges[-1], 400)
    z = (x - matrix.mean) / matrix.deviation
    density = np.exp(-0.5 * z**2) / (np.sqrt(2 * np.pi) * matrix.deviation)
    return x, density * matrix.shape[0] * matrix.shape[1] * (matrix.edges[1] - matrix.edges[0])


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)
