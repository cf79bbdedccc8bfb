"""A stock llama.cpp must refuse a ternary file as it refuses any unknown type."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pt2gguf.blocks import BLOCK_TYPES
from pt2gguf.export.llama_cpp import import_llama_cpp
from pt2gguf.native.installation import Installation

REPOSITORY = Path(__file__).resolve().parents[2]

# What every program of llama.cpp does first with a file, in a process without our libraries.
OPEN_FILE = """
import ctypes, sys
class InitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]
ggml = ctypes.CDLL(sys.argv[1])
ggml.gguf_init_from_file.restype = ctypes.c_void_p
ggml.gguf_init_from_file.argtypes = [ctypes.c_char_p, InitParams]
opened = ggml.gguf_init_from_file(sys.argv[2].encode(), InitParams(True, None))
sys.exit(0 if opened else 1)
"""


@pytest.fixture(scope="module")
def stock_ggml() -> Path:
    """libggml-base of the unpatched source, built once into build/stock."""
    directory = REPOSITORY / "build" / "stock"
    library = directory / "build" / "ggml" / "src" / "libggml-base.so"
    if not library.exists():
        (sdist,) = (REPOSITORY / "build" / "sdist").glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(sdist) as archive:
            root = archive.next().name.partition("/")[0]
            prefix = f"{root}/vendor/llama.cpp/ggml/"
            members = [m for m in archive.getmembers() if m.name.startswith(prefix)]
            archive.extractall(directory, members)
        # On its own, ggml wants a file that the sdist leaves out.
        (directory / "CMakeLists.txt").write_text(
            "cmake_minimum_required(VERSION 3.24)\nproject(stock C CXX)\n"
            f"set(BUILD_SHARED_LIBS ON)\nadd_subdirectory({prefix} ggml)\n"
        )
        configure = ["cmake", "-S", directory, "-B", directory / "build", "-DGGML_CPU=OFF"]
        subprocess.run([*configure, "-DCMAKE_BUILD_TYPE=Release"], check=True, capture_output=True)
        build = ["cmake", "--build", directory / "build", "--target", "ggml-base", "-j2"]
        subprocess.run(build, check=True, capture_output=True)
    return library


@pytest.mark.parametrize("block_type", BLOCK_TYPES.values(), ids=lambda t: t.name)
def test_invalid_ggml_type(
    tmp_path: Path, installation: Installation, stock_ggml: Path, block_type
) -> None:
    gguf = import_llama_cpp(installation).gguf
    file = tmp_path / "ternary.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor(
        "blk.0.ffn_up.weight",
        np.zeros((2, block_type.block_bytes), dtype=np.uint8),
        raw_dtype=gguf.GGMLQuantizationType[block_type.name.upper()],
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def open_with(library: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", OPEN_FILE, str(library), str(file)]
        return subprocess.run(command, capture_output=True, text=True)

    stock = open_with(stock_ggml)
    assert stock.returncode == 1
    expected = f"tensor 'blk.0.ffn_up.weight' has invalid ggml type {block_type.file_number}"
    assert expected in stock.stderr
    assert open_with(Path(installation.bin) / "libggml-base.so").returncode == 0
