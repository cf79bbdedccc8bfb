"""Where the limit is: ternary weights against what rate-distortion theory allows.

    python benchmarks/bounds.py MODEL --work DIR --calibration TEXT

DIR is what `pt2gguf convert MODEL --calibration TEXT --written 0 --no-tuning --work DIR
--keep-work` left. Writes benchmarks/results/bounds-MODEL.json and benchmarks/plots/bounds.svg.

A single weight. For a Gaussian source of variance s^2 no code of R bits per sample, however long
its blocks, has a mean squared error below D(R) = s^2 2^(-2R) (Cover and Thomas, Elements of
Information Theory, 2nd ed., Theorem 10.3.2). The best quantizer that treats each weight alone and
has three levels is Lloyd's and Max's (Max 1960); the best of any number of levels with an ideal
entropy coder behind it is very nearly one of uniform thresholds (Farvardin and Modestino 1984).

A layer. The error of a row w (1, m) is (w - q) H (w - q)^T with H = 2/N sum x x^T. For rows that
are Gaussian, independent of H, with covariance s^2 I, and H = U diag(l) U^T, the components of w U
are again independent with variance s^2, and the error is the sum over i of l_i times the squared
error of component i: m Gaussian sources of variances s^2 l_i, for which reverse water-filling is
optimal (Cover and Thomas, Theorem 10.3.3):

    D(R) = s^2 sum_i min(theta, l_i),  with theta such that  R m = sum_i max(0, log2(l_i/theta)/2).

Where theta is below all l_i ("high rate"), this is m s^2 (det H)^(1/m) 2^(-2R).

Rounding with feedback. GPTQ and LDLQ (Chee et al. 2023, QuIP, which shows that they are one) round
column by column and let the later columns compensate. With H = (I + V) diag(d) (I + V)^T, V
strictly upper triangular when the first column is rounded first, an error of variance v_j in
rounding column j costs v_j d_j in the end: d_j is the Schur complement of the later columns in H.
If rounding had the same relative error c as for the weights themselves, the sum would be
c s^2 sum_j d_j. As prod_j d_j = det H in any order, this is at least c s^2 m (det H)^(1/m): at high
rate feedback loses nothing, and ternary digits stand to the bound as c does to 2^(-2R). (Real
rounding does worse, as the feedback widens what is rounded.)
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from common import REPOSITORY, git_commit
from tables import bounds_table, gaussian_table, losses_table
from torch import Tensor, nn

from pt2gguf.blocks import BLOCK_SIZE
from pt2gguf.convert.activations import stage_inputs
from pt2gguf.convert.calibration import load_calibration
from pt2gguf.convert.groups import Group, InputGroups
from pt2gguf.convert.pipeline import batch_size, method_for
from pt2gguf.convert.workdir import WorkDirectory
from pt2gguf.evaluation.report import processor
from pt2gguf.model import Checkpoint, Skeleton
from pt2gguf.plotting.picture import BLUE, GREEN, GREY, VERMILION
from pt2gguf.ternary import InputStatistics, Method, TernaryWeight, relative_error, ternarize
from pt2gguf.ternary.grid import grid_values, initial_grid, iterative_ternary_fitting

DIGIT_BITS = math.log2(3)
FILE_BITS = 1.875  # TQ1_1, with alpha and mu
# The information in three values; TQ1_1's 26 bytes of digits; the same with one of its two
# float16; TQ1_1; TQ2_1.
RATES = (DIGIT_BITS, 26 * 8 / BLOCK_SIZE, 1.75, FILE_BITS, 2.25)
GAUSSIAN_BLOCKS = 8192
GAUSSIAN_ROWS = 256
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    options = parser.parse_args()
    name = options.model.name
    gaussian = gaussian_figures()
    fitted = gaussian["fitted to 128 weights"]
    with WorkDirectory.open_existing(options.work) as work, torch.no_grad():
        matrices = {}
        for matrix, figures in layer_figures(options.model, work, options.calibration, fitted):
            matrices[matrix] = figures
            print(matrix, figures, flush=True)
    record = {
        "command": f"benchmarks/bounds.py {name} --work DIR --calibration "
        f"{options.calibration.name}",
        "machine": processor(),
        "commit": git_commit(),
        "gaussian": gaussian,
        "matrices": matrices,
    }
    results = REPOSITORY / "benchmarks" / "results" / f"bounds-{name}.json"
    results.write_text(json.dumps(record, indent=1) + "\n")
    draw(record, REPOSITORY / "benchmarks" / "plots" / "bounds.svg")
    print(gaussian_table(record), bounds_table(record), losses_table(record), sep="\n\n")


def gaussian_figures() -> dict:
    """Mean squared errors for Gaussian weights of variance 1."""
    threshold, level, error, entropy = lloyd_max_ternary()
    optimum, fitted = fitted_ternary(GAUSSIAN_BLOCKS)
    return {
        "bound": {f"{rate:.3f}": gaussian_bound(rate) for rate in RATES},
        "entropy coded": {f"{rate:.3f}": entropy_coded(rate) for rate in RATES},
        "Lloyd-Max": error,
        "Lloyd-Max threshold": threshold,
        "Lloyd-Max level": level,
        "Lloyd-Max entropy": entropy,
        "bound at that entropy": gaussian_bound(entropy),
        "fitted to 128 weights": optimum,
        "ITF on 128 weights": fitted,
    }


def gaussian_bound(rate: float) -> float:
    """D(R) of a Gaussian of variance 1, R in bits."""
    return 2 ** (-2 * rate)


def lloyd_max_ternary() -> tuple[float, float, float, float]:
    """The best three levels -a, 0, a for a Gaussian of variance 1.

    Returns the threshold a / 2, a, the mean squared error 1 - P(|x| > a/2) a^2, and the entropy of
    the digits in bits. a is the mean beyond the threshold: a fixed point of a = phi(a/2) / Q(a/2).
    """
    a = 1.0
    for _ in range(200):
        a = _density(a / 2) / _tail(a / 2)
    outer = _tail(a / 2)
    entropy = -2 * outer * math.log2(outer) - (1 - 2 * outer) * math.log2(1 - 2 * outer)
    return a / 2, a, 1 - 2 * outer * a * a, entropy


def entropy_coded(rate: float) -> float:
    """The mean squared error of a uniform quantizer of entropy `rate`, for variance 1.

    Its cells are ((k - 1/2) step, (k + 1/2) step), its levels their means.
    """
    low, high = 0.01, 10.0  # of the step; the entropy falls as it grows
    for _ in range(60):
        step = (low + high) / 2
        entropy, error = _uniform_quantizer(step)
        low, high = (step, high) if entropy > rate else (low, step)
    return error


def _uniform_quantizer(step: float) -> tuple[float, float]:
    """Entropy in bits and mean squared error."""
    entropy, energy = 0.0, 0.0
    for k in range(math.ceil(12 / step) + 1):
        a, b = (k - 0.5) * step, (k + 0.5) * step
        probability = _tail(a) - _tail(b)
        if probability > 0:
            both = 1 if k == 0 else 2  # -k as well
            entropy -= both * probability * math.log2(probability)
            energy += both * (_density(a) - _density(b)) ** 2 / probability
    return entropy, 1 - energy


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _tail(x: float) -> float:
    return math.erfc(x / math.sqrt(2)) / 2


def fitted_ternary(blocks: int) -> tuple[float, float]:
    """Mean squared errors of alpha T + mu fitted to 128 Gaussian weights, over their variance.

    First the least of any alpha, mu and T, then what ITF finds; both over the mean of (w - mean)^2.
    """
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(blocks, BLOCK_SIZE, dtype=torch.float64, generator=generator)
    itf_errors = (W - itf_values(W)).square()
    whole = (W - W.mean(1, keepdim=True)).square().sum()
    return (optimal_errors(W).sum() / whole).item(), (itf_errors.sum() / whole).item()


def optimal_errors(W: Tensor) -> Tensor:
    """(n,): the least squared error of alpha T + mu for each row of W (n, b), over all T.

    The nearest of three levels gives the digits of an optimum, so it has -1 for the i smallest
    weights and 1 for the j largest, for some i and j: all pairs are tried. With weights w centred,
    the least squares fit on t explains b (w t)^2 / (b sum t^2 - (sum t)^2) of their energy.
    """
    columns = W.shape[1]
    centred = (W - W.mean(1, keepdim=True)).sort(dim=1).values
    below = torch.nn.functional.pad(centred.cumsum(1), (1, 0))  # [:, i]: sum of the i smallest
    explained = torch.zeros(len(W), dtype=W.dtype)
    for i in range(columns + 1):
        j = torch.arange(columns - i + 1)
        product = -below[:, columns - j] - below[:, i : i + 1]  # the whole sums to 0
        determinant = columns * (i + j) - (j - i) ** 2
        gain = columns * product.square() / determinant.clamp(min=1)
        explained = torch.maximum(explained, torch.where(determinant > 0, gain, 0.0).amax(1))
    return centred.square().sum(1) - explained


def itf_values(W: Tensor) -> Tensor:
    """What ITF alone makes of a block W (n, b)."""
    _, _, T = initial_grid(W)
    alpha, mu, T, _ = iterative_ternary_fitting(W, T)
    return grid_values(alpha, mu, T)


def layer_figures(
    model: Path, work: WorkDirectory, text: Path, fitted: float
) -> Iterator[tuple[str, dict]]:
    """The figures of every ternary matrix, on the inputs that the conversion had.

    fitted: the relative error of an optimal ternary grid on Gaussian weights.
    """
    checkpoint = Checkpoint(model)
    skeleton = Skeleton(checkpoint)
    method = replace(Method(**work.settings.method), gptaq=0.0)
    available = checkpoint.tensors.keys() - work.kept.keys()
    asked = work.settings.calibration
    calibration = load_calibration(
        [str(text)], model, samples=asked["samples"], length=asked["length"], seed=asked["seed"]
    )
    if calibration.provenance["sha256"] != asked["sha256"]:
        raise SystemExit(f"{work.path} was calibrated on another text than {text}")
    batch = batch_size(asked["length"], CPU)
    hidden, calls = skeleton.embed(calibration.ids, batch)
    for index in range(len(skeleton)):
        done = work.load_layer(index)
        layer = skeleton.load_layer(index, CPU)
        names = {
            skeleton.stored_name(index, f"{module}.weight"): module
            for module, _ in layer.named_modules()
        }
        modules = {names[name]: name for name in done.weights}
        originals = {n: layer.get_parameter(f"{m}.weight").clone() for m, n in modules.items()}
        for module, name in modules.items():
            layer.get_parameter(f"{module}.weight").copy_(done.weights[name].dequantize())

        def run(part: Tensor, layer: nn.Module = layer, index: int = index) -> Tensor:
            return calls[len(part)][index](layer, part)

        for group, statistics in input_statistics(layer, list(modules), hidden.split(batch), run):
            members = [modules[module] for module in group.modules]
            weights = [originals[name] for name in members]
            how = method_for(members[0], method, available)
            H = statistics.hessian
            limits = Limits(H, statistics, how, fitted)
            fresh, _ = ternarize(torch.cat(weights), statistics, how)
            for name, W, rows in zip(members, weights, row_ranges(weights), strict=True):
                reported = done.reports[name]["relative_error"]
                recomputed = relative_error(W, done.weights[name].dequantize(), H)
                if not math.isclose(recomputed, reported, rel_tol=1e-3):
                    raise SystemExit(
                        f"{name} has an error of {recomputed} here and of {reported} in "
                        f"{work.path}: the inputs are not the conversion's"
                    )
                part = TernaryWeight(
                    fresh.alpha[rows], fresh.mu[rows], fresh.digits[rows], fresh.perm
                )
                yield (
                    name,
                    limits.figures(W.double(), reported, relative_error(W, part.dequantize(), H)),
                )
        for part in hidden.split(batch):
            part.copy_(run(part))


def input_statistics(
    layer: nn.Module,
    modules: list[str],
    parts: tuple[Tensor, ...],
    run: Callable[[Tensor], Tensor],
) -> Iterator[tuple[Group, InputStatistics]]:
    """The statistics of each input that linear layers of `layer` read, over all `parts`."""
    groups = InputGroups(layer, modules)
    with groups.watch():
        run(parts[0])
    for stage in groups.stages():
        statistics = {g: InputStatistics(g.columns, CPU, False) for g in stage.groups}
        for part in parts:
            for group, x in stage_inputs(layer, stage, partial(run, part)).items():
                statistics[group].add(x)
        yield from statistics.items()


def row_ranges(weights: list[Tensor]) -> list[slice]:
    """Where each of `weights` lies when they are stacked."""
    ends = list(accumulate(len(weight) for weight in weights))
    return [slice(end - len(weight), end) for end, weight in zip(ends, weights, strict=True)]


class Limits:
    """What theory says about matrices that read one input."""

    def __init__(
        self, H: Tensor, statistics: InputStatistics, method: Method, fitted: float
    ) -> None:
        """H: (m, m), the Hessian in `statistics`; fitted: see `fitted_ternary`."""
        columns = len(H)
        self._H = H
        self._spectrum = torch.linalg.eigvalsh(H)
        generator = torch.Generator().manual_seed(0)
        gaussian = torch.randn(GAUSSIAN_ROWS, columns, generator=generator, dtype=torch.float64)
        weight, _ = ternarize(gaussian, statistics, method)
        error = relative_error(gaussian, weight.dequantize(), H)
        # All of these are for one row of variance 1.
        self._ours = error * energy(gaussian, H) / GAUSSIAN_ROWS
        self._feedback = fitted * feedback_costs(H, weight.perm).sum().item()
        self._determinant = fitted * columns * self._spectrum.log().mean().exp().item()

    def figures(self, W: Tensor, converted: float, own_outputs: float) -> dict:
        """The figures of W (n, m); all errors are shares of tr(W H W^T)."""
        blocks = W.unflatten(1, (-1, BLOCK_SIZE))
        centred = blocks - blocks.mean(2, keepdim=True)
        itf = torch.cat([itf_values(block) for block in W.split(BLOCK_SIZE, dim=1)], dim=1)
        variance = centred.square().mean()
        share = (len(W) * variance / energy(W, self._H)).item()  # of one row of variance 1
        spectrum = self._spectrum * share
        return {
            "shape": list(W.shape),
            "excess kurtosis": kurtosis(centred),
            "ITF, weights alone": ((W - itf).square().sum() / centred.square().sum()).item(),
            "ITF": energy(W - itf, self._H) / energy(W, self._H),
            "converted": converted,
            "own outputs": own_outputs,
            "Gaussian weights": self._ours * share,
            "ternary, ideal feedback": self._feedback * share,
            "ternary, determinant": self._determinant * share,
            "bound": {f"{rate:.3f}": reverse_water_filling(spectrum, rate) for rate in RATES},
            "equivalent bits": equivalent_rate(spectrum, own_outputs),
            "equivalent bits, converted": equivalent_rate(spectrum, converted),
        }


def energy(W: Tensor, H: Tensor) -> float:
    """tr(W H W^T)."""
    return ((W @ H) * W).sum().item()


def kurtosis(centred: Tensor) -> float:
    """Excess kurtosis of the weights (n, blocks, 128), each row of a block scaled to variance 1.

    128 Gaussian weights so scaled have -6/129 on average.
    """
    variance = centred.square().mean(2, keepdim=True)
    return (centred.square() / variance).square().mean().item() - 3


def feedback_costs(H: Tensor, perm: Tensor | None) -> Tensor:
    """d (m,) of the module's text: column perm[0] is rounded first."""
    order = torch.arange(len(H)) if perm is None else perm
    backwards = order.flip(0)
    # L[k, k]^2 is the Schur complement of the columns before k, which are those rounded later.
    L = torch.linalg.cholesky(H[backwards.unsqueeze(1), backwards])
    return L.diagonal().square().flip(0)


def reverse_water_filling(variances: Tensor, rate: float) -> float:
    """D(R) of independent Gaussians of `variances` (m,), R = `rate` bits for each on average."""
    logs = variances.sort(descending=True).values.log2()
    active = torch.arange(1, len(logs) + 1, dtype=logs.dtype)
    # theta where exactly the k largest get bits; right for the largest k that leaves it below them.
    theta = logs.cumsum(0) / active - 2 * rate * len(logs) / active
    count = int((theta < logs).sum())
    return variances.clamp(max=(2 ** theta[count - 1]).item()).sum().item()


def equivalent_rate(variances: Tensor, error: float) -> float:
    """The rate at which D(R) of independent Gaussians is `error`."""
    low, high = 0.0, 8.0
    for _ in range(50):
        rate = (low + high) / 2
        low, high = (rate, high) if reverse_water_filling(variances, rate) > error else (low, rate)
    return rate


def draw(record: dict, output: Path) -> None:
    """Each kind of matrix has a panel; its layers go from left to right."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    kinds: dict[str, list[dict]] = {}
    for name, figures in record["matrices"].items():
        kinds.setdefault(name.split(".")[-2], []).append(figures)
    figure = Figure(figsize=(1.5 * len(kinds) + 1, 4.2), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True)
    for axes, (kind, matrices) in zip(panels, kinds.items(), strict=True):
        layers = range(len(matrices))
        low, high = (
            [m["bound"][f"{rate:.3f}"] for m in matrices] for rate in (FILE_BITS, DIGIT_BITS)
        )
        axes.fill_between(
            layers, low, high, color=GREY, alpha=0.5, label="Gaussian bound, 1.585 to 1.875 bits"
        )
        for key, label, look in (
            ("ITF", "ITF alone", {"color": VERMILION, "marker": "^", "linestyle": ":"}),
            ("converted", "default", {"color": BLUE, "marker": "o"}),
            (
                "own outputs",
                "default for the matrix's own outputs",
                {"color": BLUE, "marker": "o", "linestyle": "--", "markerfacecolor": "white"},
            ),
            (
                "Gaussian weights",
                "the same, of Gaussian weights",
                {"color": "black", "marker": "x", "linestyle": ""},
            ),
            ("ternary, ideal feedback", "ternary with ideal feedback", {"color": GREEN}),
        ):
            axes.plot(
                layers, [m[key] for m in matrices], label=label, linewidth=1, markersize=4, **look
            )
        axes.set_title(kind, fontsize="small")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        axes.set_xlabel("layer", fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
        axes.tick_params(labelsize="small")
    panels[0].set_ylabel("error as a share of the output's energy", fontsize="small")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        fontsize="small",
        frameon=False,
    )
    output.parent.mkdir(exist_ok=True)
    with rc_context({"svg.hashsalt": "bounds"}):  # else its ids are random
        figure.savefig(output, metadata={"Date": None})


if __name__ == "__main__":
    main()
