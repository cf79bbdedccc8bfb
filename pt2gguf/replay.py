"""Functions of tensors as CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor


class Replayed:
    """A function of tensors, its kernels replayed as one CUDA graph where there is a GPU.

    They are many small ones, which take longer to launch one by one than to run. There is a graph
    for each combination of shapes; the function must not wait for the GPU.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self._function = function
        self._graphs: dict[tuple[torch.Size, ...], _Graph] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if not inputs[0].is_cuda:
            return self._function(*inputs)
        shapes = tuple(given.shape for given in inputs)
        if shapes not in self._graphs:
            self._graphs[shapes] = _Graph(self._function, inputs)
        return self._graphs[shapes].replay(inputs)


class _Graph:
    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]
    ) -> None:
        self._inputs = tuple(given.clone() for given in inputs)
        stream = _capturing_stream(inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # once outside, for what libraries do the first time
            function(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._outputs = function(*self._inputs)

    def replay(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)


@lru_cache
def _capturing_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs, as cuBLAS keeps memory for every stream that it has seen."""
    return torch.cuda.Stream(device)


def replayed_if_possible(
    function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor
) -> Replayed | None:
    """The function as a graph for inputs of these shapes; None if it waits for the GPU, or fails.

    It is called with them.
    """
    replayed = Replayed(function)
    try:
        with _waiting_fails():
            function(*inputs)
        replayed(*inputs)
    except RuntimeError:
        return None
    return replayed


@contextmanager
def _waiting_fails() -> Iterator[None]:
    """Within this context, what waits for the GPU is a RuntimeError, as far as PyTorch sees it."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
