"""The mathematics of PT2-LLM as pure functions on tensors: W ~ alpha * T + mu, T in {-1, 0, 1}."""

from pt2gguf.ternary.grid import round_to_half
from pt2gguf.ternary.method import METHODS, Method
from pt2gguf.ternary.statistics import (
    InputStatistics,
    NonFiniteInputs,
    OutputStatistics,
    output_bytes,
)
from pt2gguf.ternary.stock import CHUNK, StockGrid, StockWeight, round_to_stock
from pt2gguf.ternary.ternarize import TernarizationReport, relative_error, ternarize
from pt2gguf.ternary.weight import TernaryWeight

__all__ = [
    "CHUNK",
    "METHODS",
    "InputStatistics",
    "Method",
    "NonFiniteInputs",
    "OutputStatistics",
    "StockGrid",
    "StockWeight",
    "TernarizationReport",
    "TernaryWeight",
    "output_bytes",
    "relative_error",
    "round_to_half",
    "round_to_stock",
    "ternarize",
]
