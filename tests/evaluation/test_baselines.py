"""RTN and GPTQ against plain implementations of their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import VOCABULARY, make_model, save_model

from pt2gguf.evaluation.baselines import (
    BITS_PER_WEIGHT,
    DAMPING,
    UniformGrid,
    gptq,
    gptq_weights,
    round_to_nearest,
)
from pt2gguf.model import Checkpoint, Skeleton, load_model

CPU = torch.device("cpu")


def random_hessian(columns: int, seed: int) -> torch.Tensor:
    """Of strongly correlated inputs: a quarter as many directions, and some noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = 2 * columns
    x = normal(tokens, columns // 4) @ normal(columns // 4, columns) + normal(tokens, columns)
    return 2 * x.T @ x / tokens


def test_bits_per_weight() -> None:
    """128 weights of two bits, a float16 scale, and a zero point of two bits."""
    assert BITS_PER_WEIGHT == (128 * 2 + 16 + 2) / 128


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shift=st.floats(-5, 5),
    exponent=st.integers(-4, 3),
)
def test_rtn_is_within_half_a_step(seed: int, shift: float, exponent: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    W = (torch.randn(3, 256, generator=generator, dtype=torch.float64) + shift) * 10.0**exponent
    Q = round_to_nearest(W)
    for row, values in zip(W.view(-1, 128), Q.view(-1, 128), strict=True):
        step = (row.max().clamp(min=0) - row.min().clamp(max=0)) / 3
        assert len(values.unique()) <= 4
        # float16 moves the step by 2^-11 of itself, and the grid's end by four times that; below
        # its normal numbers, by 2^-25.
        slack = 4 * (step * 2**-11 + 2**-25)
        assert (row - values).abs().max() <= step / 2 + slack


def test_rtn_of_constant_rows() -> None:
    W = torch.tensor([[0.0], [3.0], [-6.0]]).expand(3, 128)
    assert torch.equal(round_to_nearest(W), W.double())


def test_gptq_with_uncorrelated_inputs_is_rtn() -> None:
    W = torch.randn(5, 384, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gptq(W, torch.eye(384, dtype=torch.float64)), round_to_nearest(W))


@pytest.mark.parametrize("columns", [128, 256, 384])
def test_gptq_is_optimal_brain_quantization(columns: int) -> None:
    """Against the update formula of its paper, with a new inverse of H for each column."""
    W = np.random.default_rng(columns).normal(size=(6, columns))
    H = random_hessian(columns, seed=columns).numpy()
    H = H + DAMPING * np.mean(np.diag(H)) * np.eye(columns)
    actual = gptq(torch.from_numpy(W), random_hessian(columns, seed=columns)).numpy()
    left = W.copy()
    for j in range(columns):
        if j % 128 == 0:
            grid = UniformGrid.spanning(torch.from_numpy(left[:, j : j + 128]))
        q = grid.nearest(torch.from_numpy(left[:, j : j + 1])).numpy()
        inverse = np.linalg.inv(H[j:, j:])
        left[:, j:] -= (left[:, j : j + 1] - q) / inverse[0, 0] * inverse[0]
        left[:, j : j + 1] = q
    # Rounding is not continuous: a tie that falls the other way would change what follows.
    np.testing.assert_allclose(actual, left, atol=1e-9)


def test_gptq_gives_a_smaller_output_error_than_rtn() -> None:
    W = torch.randn(32, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    H = random_hessian(256, seed=1)

    def error(Q: torch.Tensor) -> float:
        return (((W - Q) @ H) * (W - Q)).sum().item()

    assert error(gptq(W, H)) < 0.8 * error(round_to_nearest(W))


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_the_layers_are_quantized_on_what_the_layers_before_give(tmp_path, kind: str) -> None:
    checkpoint = Checkpoint(save_model(tmp_path, kind))
    skeleton = Skeleton(checkpoint)
    names = [
        name
        for name, stored in checkpoint.tensors.items()
        if name.startswith("model.layers") and len(stored.shape) > 1 and "mlp.gate.w" not in name
    ]
    ids = torch.randint(0, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(2))
    weights = gptq_weights(skeleton, names, ids, CPU)
    assert weights.keys() == set(names)
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    # The last attention output: everything before it is quantized when its inputs are taken.
    name = "model.layers.1.self_attn.o_proj.weight"
    inputs: list[torch.Tensor] = []
    model = load_model(checkpoint, weights)
    model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].flatten(0, 1).double())
    )
    with torch.inference_mode():
        model(ids)
    x = torch.cat(inputs)
    expected = gptq(checkpoint.read(name), 2 * x.T @ x / len(x)).float()
    # Of float32's rounding, single weights may fall to the other side.
    assert (weights[name] != expected).float().mean() < 0.01


def test_the_model_of_a_checkpoint_with_other_weights(tmp_path) -> None:
    checkpoint = Checkpoint(save_model(tmp_path, "qwen3"))  # its head is its embeddings
    name = "model.layers.1.mlp.up_proj.weight"
    model = load_model(checkpoint, {name: torch.zeros(256, 128)})
    original = make_model("qwen3").state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, torch.zeros(256, 128) if key == name else original[key])
