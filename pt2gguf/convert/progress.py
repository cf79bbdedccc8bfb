"""What a person sees while a conversion runs."""

from __future__ import annotations

import resource
import sys
import time
from typing import Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

RECENT_LAYERS = 4  # that the estimate of the remaining time is made from
RECENT_STEPS = 8
SECONDS_BETWEEN_STEPS = 10.0  # of the tuning, that are shown


class Reporter(Protocol):
    """Receives the events of a conversion, in this order."""

    def note(self, message: str) -> None:
        """Something that the user should know; at any time."""

    def start(self, layers: int) -> None:
        """The loop over decoder layers begins."""

    def layer_started(self, index: int) -> None: ...

    def weight_done(self, name: str, shape: tuple[int, ...], error: float, seconds: float) -> None:
        """error: the weight's relative output error; seconds: since the one before."""

    def layer_done(self, index: int, reused: bool) -> None:
        """reused: it was finished by an earlier run, and only its outputs were computed."""

    def stop(self) -> None:
        """The loop has ended, or failed."""

    def tuning_started(self, steps: int) -> None:
        """The tuning of the grids begins or goes on, of `steps` steps altogether."""

    def tuning_step(self, step: int, steps: int, loss: float) -> None:
        """A step, counted from 0, is done; loss: the mean KL divergence before it."""


class ConsoleReporter:
    """Writes to a terminal with a bar, and to anything else as plain lines."""

    def __init__(self, console: Console, device: torch.device, verbose: bool = True) -> None:
        """verbose: also a line for each weight."""
        self._console = console
        self._device = device
        self._verbose = verbose
        self._layers = 0
        self._begun = 0.0
        self._seconds: list[float] = []  # of the layers that were not reused
        self._tuning_seconds: list[float] = []
        self._shown = 0.0  # when a step of the tuning was shown last
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def note(self, message: str) -> None:
        self._print(f"note: {message}")

    def start(self, layers: int) -> None:
        self._layers = layers
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                console=self._console,
            )
            self._task = self._progress.add_task("layers", total=layers, status="")
            self._progress.start()

    def layer_started(self, index: int) -> None:
        self._begun = time.monotonic()

    def weight_done(self, name: str, shape: tuple[int, ...], error: float, seconds: float) -> None:
        if self._verbose:
            size = "x".join(map(str, shape))
            self._print(f"  {name}  {size}  error {error:.4f}  {seconds:.1f} s")

    def layer_done(self, index: int, reused: bool) -> None:
        seconds = time.monotonic() - self._begun
        if not reused:
            self._seconds.append(seconds)
        left = self._layers - index - 1
        recent = self._seconds[-RECENT_LAYERS:]
        eta = f", about {_clock(left * sum(recent) / len(recent))} left" if left and recent else ""
        done = "reused" if reused else "done"
        memory = f"peak memory {peak_memory(self._device) / 1e9:.2f} GB"
        status = f"{seconds:.1f} s, {memory}{eta}"
        self._print(f"layer {index + 1}/{self._layers} {done} in {status}")
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=index + 1, status=eta.lstrip(", "))

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def tuning_started(self, steps: int) -> None:
        self._begun = self._shown = time.monotonic()
        self._print(f"tuning the grids on the model's logits, {steps} steps")

    def tuning_step(self, step: int, steps: int, loss: float) -> None:
        now = time.monotonic()
        self._tuning_seconds.append(now - self._begun)
        self._begun = now
        last = step + 1 == steps
        if not last and now - self._shown < SECONDS_BETWEEN_STEPS:
            return
        self._shown = now
        recent = self._tuning_seconds[-RECENT_STEPS:]
        left = (steps - step - 1) * sum(recent) / len(recent)
        memory = f"peak memory {peak_memory(self._device) / 1e9:.2f} GB"
        eta = "" if last else f", about {_clock(left)} left"
        self._print(f"tuning step {step + 1}/{steps}, divergence {loss:.4f}, {memory}{eta}")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class SilentReporter:
    """Keeps the notes and shows nothing."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def start(self, layers: int) -> None: ...

    def layer_started(self, index: int) -> None: ...

    def weight_done(
        self, name: str, shape: tuple[int, ...], error: float, seconds: float
    ) -> None: ...

    def layer_done(self, index: int, reused: bool) -> None: ...

    def stop(self) -> None: ...

    def tuning_started(self, steps: int) -> None: ...

    def tuning_step(self, step: int, steps: int, loss: float) -> None: ...


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that this process has held on the GPU, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
