"""Every stock type that the command line offers can be written."""

from __future__ import annotations

import numpy as np
import pytest

from pt2gguf.errors import Pt2Error
from pt2gguf.export.llama_cpp import LlamaCpp, import_llama_cpp
from pt2gguf.export.stock_types import STOCK_TYPES, fitting_type, parse_stock_type
from pt2gguf.native.installation import find_installation

# The largest step of each type for weights in [-1, 1], from its bits per weight; K-quants below
# 4 bits have sub-block scales of 4 bits themselves.
LARGEST_ERROR = {
    "f32": 0,
    "f16": 2**-11,
    "bf16": 2**-8,
    "q8_0": 1 / 127,
    "q6_k": 2 / 31,
    "q5_k": 2 / 15,
    "q4_k": 2 / 7,
    "q3_k": 2 / 3,
    "q2_k": 2 / 2,
    "q5_0": 2 / 15,
    "q4_0": 2 / 7,
}


@pytest.fixture(scope="module")
def llama_cpp() -> LlamaCpp:
    return import_llama_cpp(find_installation())


@pytest.mark.parametrize("name", STOCK_TYPES)
def test_values_survive_within_the_types_step(llama_cpp: LlamaCpp, name: str) -> None:
    gguf = llama_cpp.gguf
    weights = np.random.default_rng().uniform(-1, 1, (3, 512)).astype(np.float32)
    qtype = fitting_type(name, 512, gguf)
    assert qtype.name.lower() == name
    packed = gguf.quants.quantize(weights, qtype)
    restored = gguf.quants.dequantize(packed, qtype).reshape(weights.shape)
    assert np.abs(restored - weights).max() <= LARGEST_ERROR[name]


@pytest.mark.parametrize(
    ("columns", "expected"), [(512, "Q6_K"), (128, "Q8_0"), (96, "Q8_0"), (100, "F16")]
)
def test_rows_that_blocks_do_not_divide_get_a_larger_type(llama_cpp, columns, expected) -> None:
    assert fitting_type("q6_k", columns, llama_cpp.gguf).name == expected


def test_unknown_types_are_refused() -> None:
    assert parse_stock_type("Q6_K") == "q6_k"
    with pytest.raises(Pt2Error, match="'iq9' is not a type for this option: choose f32, "):
        parse_stock_type("iq9")
