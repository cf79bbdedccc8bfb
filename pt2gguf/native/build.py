"""Building the patched llama.cpp and putting it into the environment.

CMake does the work (``cmake/CMakeLists.txt``: bring the source at the pin, patch, compile); this
module runs it and then makes the result the environment's: the tools are linked into its ``bin``,
and the ``llama_cpp`` module gets the patched libraries in place of its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from pt2gguf.errors import Pt2Error
from pt2gguf.native.installation import LLAMA_CPP_PYTHON_VERSION, Installation

_TOOLS = ("llama-*", "ggml-rpc-server", "test-backend-ops", "test-quantize-fns")
_LIBRARIES = ("*ggml*.so*", "libllama.so*", "libmtmd.so*", "*.dylib", "*.dll")


def default_build_directory() -> Path:
    """Where the build goes unless told otherwise: it lives and dies with the environment."""
    return Path(sys.prefix) / "share" / "pt2gguf" / "build"


def build(
    build_directory: Path, source: Path | None, jobs: int | None, cmake_options: list[str]
) -> Installation:
    """Builds llama.cpp and installs it into the running environment.

    Args:
        build_directory: where the source, objects, tools and libraries go; reused if it exists.
        source: a llama.cpp tree at the pin, to copy; None brings the source with pip.
        jobs: parallel compilations; None leaves it to the build tool.
        cmake_options: passed to CMake as they are, such as ``-DGGML_CUDA=ON``.

    Raises:
        Pt2Error: no compiler, or CMake failed (its own message is on the terminal).
    """
    _require_compiler()
    _require_writable_environment()
    project = _cmake_project()
    options = list(cmake_options)
    options.append(f"-DPython3_EXECUTABLE={sys.executable}")
    options.append(f"-DPT2_LLAMA_CPP_SOURCE={source.resolve() if source else ''}")
    generator = [] if (build_directory / "CMakeCache.txt").is_file() else _generator()
    directories = ["-S", str(project), "-B", str(build_directory)]
    _run(["cmake", *generator, *directories, *options], "configuring")
    parallel = ["--parallel", str(jobs)] if jobs else ["--parallel"]
    _run(["cmake", "--build", str(build_directory), *parallel], "compiling")

    installation = Installation(
        bin=str(build_directory.resolve() / "bin"),
        source=str(build_directory.resolve() / "llama.cpp"),
        version=LLAMA_CPP_PYTHON_VERSION,
    )
    _link_tools(Path(installation.bin))
    _install_bindings(Path(installation.bin), build_directory)
    installation.save()
    return installation


def _require_compiler() -> None:
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl"]
    if not any(name and shutil.which(name) for name in compilers):
        raise Pt2Error(
            "no C++ compiler was found: install one (Debian: apt-get install g++) or set CXX"
        )


def _require_writable_environment() -> None:
    for directory in (sys.prefix, sysconfig.get_path("scripts"), sysconfig.get_path("purelib")):
        if not os.access(directory, os.W_OK):
            raise Pt2Error(f"{directory} is not writable: use a virtual environment of your own")
    if importlib.util.find_spec("pip") is None:
        raise Pt2Error(f"{sys.prefix} has no pip, which brings the bindings: python -m ensurepip")


def _cmake_project() -> Path:
    """``cmake/`` of the checkout, or the copy that the wheel carries."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "cmake", package.parents[1] / "cmake"):
        if (candidate / "CMakeLists.txt").is_file():
            return candidate
    raise Pt2Error(f"{package / 'cmake'} is missing: install pt2gguf again")


def _generator() -> list[str]:
    return ["-G", "Ninja"] if shutil.which("ninja", path=_search_path()) else []


def _search_path() -> str:
    """With the environment's own programs: cmake and ninja come as packages."""
    return sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", "")


def _run(command: list[str], doing: str) -> None:
    try:
        subprocess.run(command, check=True, env={**os.environ, "PATH": _search_path()})
    except FileNotFoundError:
        raise Pt2Error(f"{command[0]} was not found: pip install {command[0]}") from None
    except subprocess.CalledProcessError as error:
        raise Pt2Error(
            f"{doing} llama.cpp failed with exit code {error.returncode}: see the messages above"
        ) from None


def _link_tools(bin_directory: Path) -> None:
    scripts = Path(sysconfig.get_path("scripts"))
    for pattern in _TOOLS:
        for tool in bin_directory.glob(pattern):
            if tool.is_file() and os.access(tool, os.X_OK) and ".so" not in tool.name:
                link = scripts / tool.name
                link.unlink(missing_ok=True)
                link.symlink_to(tool)


def _install_bindings(bin_directory: Path, build_directory: Path) -> None:
    """Installs llama-cpp-python without libraries of its own, then gives it ours."""
    if _installed_bindings() != LLAMA_CPP_PYTHON_VERSION:
        sdist = build_directory / "sdist" / f"llama_cpp_python-{LLAMA_CPP_PYTHON_VERSION}.tar.gz"
        pinned = f"llama-cpp-python=={LLAMA_CPP_PYTHON_VERSION}"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-binary", "llama-cpp-python"]
        without_cmake = ["--config-settings", "wheel.cmake=false"]
        package = str(sdist) if sdist.is_file() else pinned
        _run([*pip, *without_cmake, package], "installing the bindings of")
        importlib.invalidate_caches()
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise Pt2Error("llama-cpp-python did not install: pip install llama-cpp-python, then build")
    libraries = Path(spec.origin).parent / "lib"
    shutil.rmtree(libraries, ignore_errors=True)
    libraries.mkdir()
    for pattern in _LIBRARIES:
        for library in bin_directory.glob(pattern):
            shutil.copy2(library, libraries / library.name, follow_symlinks=False)


def _installed_bindings() -> str | None:
    try:
        return importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return None
