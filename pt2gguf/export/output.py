"""Output files: refused early if they cannot be written, and there only when they are complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pt2gguf.errors import Pt2Error


def require_writable(output: Path, force: bool) -> None:
    """Raises :class:`Pt2Error` unless `output` can be written; if it exists, only with `force`."""
    if output.is_dir():
        raise Pt2Error(f"{output} is a directory: name a file, such as {output}/model.gguf")
    if output.exists() and not force:
        raise Pt2Error(f"{output} exists: choose another name, or --force to replace it")
    if not output.parent.is_dir():
        raise Pt2Error(f"{output.parent} is not a directory: create it, or choose another place")
    if not os.access(output.parent, os.W_OK):
        raise Pt2Error(f"{output.parent} is not writable: choose another place for {output.name}")


@contextmanager
def complete_file(output: Path) -> Iterator[Path]:
    """A temporary name to write to; the file gets its own when the block ends without an error.

    Raises :class:`Pt2Error` for a disk that is full or cannot be written.
    """
    part = output.with_name(output.name + ".part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(output)
    except OSError as error:
        raise Pt2Error(
            f"{output} cannot be written ({error.strerror or error}): free space, or choose "
            "another place"
        ) from error
    finally:
        part.unlink(missing_ok=True)
