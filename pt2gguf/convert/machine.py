"""The device that computes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pt2gguf.errors import Pt2Error


def usable_device(name: str | torch.device) -> torch.device:
    """The device called `name`. Raises Pt2Error unless it is the CPU or a GPU that is there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise Pt2Error(f"{name!r} is not a device: choose cpu or cuda") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise Pt2Error(f"device {device} is not supported: choose cpu or cuda")
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise Pt2Error(
            f"device {device} is not there: PyTorch {torch.__version__} finds "
            f"{torch.cuda.device_count()} CUDA GPUs; choose cpu, or install a CUDA build of PyTorch"
        )
    return torch.device("cuda", device.index or 0)


@contextmanager
def deterministic(device: torch.device, threads: int) -> Iterator[None]:
    """Within this context, PyTorch works on `device`, and repeats its results exactly.

    On a GPU, products of float32 matrices are TF32's, which has the precision of the float16 that
    such models are commonly calibrated in, and several times its speed; sums stay float32. cuDNN's
    attention is left out: its gradients depend on the order in which its parts finish. So is the
    filling of new memory that PyTorch adds: it takes as long as many an operation itself.
    """
    precision_before = torch.get_float32_matmul_precision()
    threads_before = torch.get_num_threads()
    strict = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn_attention = torch.backends.cuda.cudnn_sdp_enabled()
    memory: Any = torch.utils.deterministic
    filling = memory.fill_uninitialized_memory
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)
        memory.fill_uninitialized_memory = False
    torch.set_num_threads(threads)
    # Graphs and kernels of our own go to the current GPU, wherever their tensors are.
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    try:
        with current:
            yield
    finally:
        torch.set_num_threads(threads_before)
        torch.set_float32_matmul_precision(precision_before)
        torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)
        memory.fill_uninitialized_memory = filling
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)


class RepeatableAttention(TorchFunctionMode):
    """Within this context, attention gives the same gradients every time.

    PyTorch has a repeatable algorithm for them, but takes it only where operations that are not
    repeatable at all are forbidden: as they are here while the gradients of attention are computed.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is nn.functional.scaled_dot_product_attention and output.grad_fn is not None:
            warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
            enabled = torch.are_deterministic_algorithms_enabled()
            node = output.grad_fn
            node.register_prehook(lambda *_: torch.use_deterministic_algorithms(True))
            node.register_hook(
                lambda *_: torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
            )
        return output


def computes_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 matrices are native there, and so faster than float32's."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def describe_device(device: torch.device) -> str:
    """What results depend on."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    bfloat16 = " with bfloat16" if computes_bfloat16(device) else ""
    return f"cpu {torch.backends.cpu.get_cpu_capability()}{bfloat16}"
