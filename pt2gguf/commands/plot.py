"""``pt2gguf plot``: pictures of a checkpoint's weights, and of what a conversion made of them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pt2gguf.errors import Pt2Error
from pt2gguf.export.output import require_writable

if TYPE_CHECKING:
    from pt2gguf.model import Checkpoint
    from pt2gguf.plotting.stored import StoredWeights

MOST_MATRICES = 16


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "plot",
        help="draw weight distributions and block variances",
        description=(
            "Draws, for each matrix that --tensor matches, the distribution of its weights and the "
            "variance of its blocks of 128 columns in the natural order and in that of SSR; with a "
            "ternary file or its work directory, also the ternary values and the stored order."
        ),
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint directory, or a name on the hub")
    parser.add_argument(
        "--tensor",
        metavar="REGEX",
        required=True,
        help=f"which matrices, by their names in the checkpoint (at most {MOST_MATRICES})",
    )
    ternary = parser.add_mutually_exclusive_group()
    ternary.add_argument("--file", metavar="FILE.gguf", type=Path, help="MODEL as converted")
    ternary.add_argument(
        "--work", metavar="DIR", type=Path, help="what `convert --keep-work` left of MODEL"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="PICTURE",
        type=Path,
        required=True,
        help="the file to write: .png, .svg or .pdf",
    )
    parser.add_argument("--force", action="store_true", help="replace PICTURE")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from pt2gguf.commands.convert import local_directory
    from pt2gguf.model import Checkpoint
    from pt2gguf.plotting.picture import require_drawable, write_picture
    from pt2gguf.plotting.summary import summarize

    require_writable(options.output, options.force)
    require_drawable(options.output)
    checkpoint = Checkpoint(local_directory(options.model))
    names = matching_matrices(checkpoint, options.tensor)
    with _stored_weights(checkpoint, options.file, options.work) as stored:
        matrices = []
        for name, W in checkpoint.read_all(names):
            ternary = None if stored is None else stored.weight(name)
            if ternary is not None and ternary.digits.shape != W.shape:
                raise Pt2Error(
                    f"{name} is {tuple(W.shape)} in {checkpoint.path} and "
                    f"{tuple(ternary.digits.shape)} in {options.file or options.work}: give what "
                    "this very model was converted to"
                )
            matrices.append(summarize(name, W, ternary))
    write_picture(matrices, options.output)
    print(f"{options.output}: {len(matrices)} of {len(checkpoint.tensors)} tensors")


def matching_matrices(checkpoint: Checkpoint, pattern: str) -> list[str]:
    """The checkpoint's names of the matrices to draw, in the order of their numbers.

    Raises Pt2Error for a pattern that is no regular expression, or matches none or too many.
    """
    from pt2gguf.blocks import BLOCK_SIZE

    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise Pt2Error(f"--tensor {pattern!r} is not a regular expression: {error}") from None
    matrices = [
        name
        for name, stored in checkpoint.tensors.items()
        if len(stored.shape) == 2 and 0 not in stored.shape and stored.shape[1] % BLOCK_SIZE == 0
    ]
    found = sorted(filter(wanted.search, matrices), key=_by_number)
    if not found:
        example = f", such as {min(matrices, key=_by_number)}" if matrices else ""
        raise Pt2Error(
            f"--tensor {pattern!r} matches none of the {len(matrices)} matrices of "
            f"{checkpoint.path} with rows of a multiple of {BLOCK_SIZE}{example}: choose one of "
            "those"
        )
    if len(found) > MOST_MATRICES:
        raise Pt2Error(
            f"--tensor {pattern!r} matches {len(found)} matrices, from {found[0]} to {found[-1]}, "
            f"and a picture holds {MOST_MATRICES}: choose fewer, such as {found[0]}"
        )
    return found


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 after layer 2."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


@contextmanager
def _stored_weights(
    checkpoint: Checkpoint, file: Path | None, work_directory: Path | None
) -> Iterator[StoredWeights | None]:
    """What a conversion made of the checkpoint; None if neither place is given."""
    from pt2gguf.plotting.stored import GgufWeights, WorkWeights

    if file is not None:
        from pt2gguf.commands.convert import gguf_namer
        from pt2gguf.export.llama_cpp import import_llama_cpp
        from pt2gguf.model import Skeleton
        from pt2gguf.native.installation import find_installation

        llama_cpp = import_llama_cpp(find_installation())
        yield GgufWeights(file, llama_cpp.gguf, gguf_namer(llama_cpp, Skeleton(checkpoint)))
    elif work_directory is not None:
        from pt2gguf.convert.workdir import WorkDirectory

        with WorkDirectory.open_existing(work_directory) as work:
            if work.settings.model != checkpoint.fingerprint():
                raise Pt2Error(
                    f"{work_directory} was made of another checkpoint than {checkpoint.path}: give "
                    "the one that it was made of"
                )
            yield WorkWeights(work)
    else:
        yield None
