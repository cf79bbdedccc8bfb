"""The options about calibration, which commands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pt2gguf.convert.calibration import Calibration
    from pt2gguf.model import Skeleton

DEFAULT_LENGTH = 2048


def add_calibration_options(group: Any) -> None:
    group.add_argument(
        "--calibration",
        metavar="FILE|NAME",
        action="append",
        help="text file, data set (wikitext2, c4, ptb) or .npy of token ids (repeatable); "
        "default: wikitext2",
    )
    group.add_argument(
        "--samples", metavar="N", type=positive, default=128, help="windows (default: %(default)s)"
    )
    group.add_argument(
        "--length",
        metavar="N",
        type=positive,
        help=f"tokens in a window (default: {DEFAULT_LENGTH}, or the model's context)",
    )
    group.add_argument(
        "--seed", metavar="N", type=_seed, default=0, help="of the windows (default: %(default)s)"
    )


def calibration_for(skeleton: Skeleton, options: argparse.Namespace) -> Calibration:
    """The calibration that `options` ask for."""
    from pt2gguf.convert.calibration import load_calibration

    context = getattr(skeleton.config, "max_position_embeddings", None) or DEFAULT_LENGTH
    return load_calibration(
        options.calibration or ["wikitext2"],
        skeleton.checkpoint.path,
        samples=options.samples,
        length=options.length or min(DEFAULT_LENGTH, context),
        seed=options.seed,
    )


def positive(text: str) -> int:
    """An argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def whole(text: str) -> int:
    """An argparse type."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:  # the file keeps it in 32 bits
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and {2**32 - 1}")
    return int(text)
