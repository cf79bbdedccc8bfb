"""The hooks fit the pinned source and nothing else, and a tree at the pin is recognised."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import tarfile
from pathlib import Path

import pytest

from pt2gguf.native.installation import LLAMA_CPP_PYTHON_VERSION

REPOSITORY = Path(__file__).resolve().parents[2]
HOOKS = sorted((REPOSITORY / "ggml_patches" / "hooks").glob("*.patch"))
PIN = dict(
    re.findall(r'set\(PT2_PIN_(\w+)\s+"(.*)"\)', (REPOSITORY / "cmake" / "pin.cmake").read_text())
)
PRELUDE = f"""
cmake_minimum_required(VERSION 3.24)
set(PT2_PATCHES "{REPOSITORY}/ggml_patches")
foreach(part pin patch source)
    include("{REPOSITORY}/cmake/${{part}}.cmake")
endforeach()
"""


def hooked_files(hook: Path) -> list[str]:
    return re.findall(r"^\+\+\+ b/(\S+)$", hook.read_text(), re.MULTILINE)


ALL_HOOKED = sorted({name for hook in HOOKS for name in hooked_files(hook)})


@pytest.fixture(scope="module")
def pristine(installation, tmp_path_factory) -> Path:
    """llama.cpp as the pinned sdist carries it. Not to be changed: trees are linked to it."""
    archive = Path(installation.source).parent / "sdist"
    archive /= f"llama_cpp_python-{LLAMA_CPP_PYTHON_VERSION}.tar.gz"
    if not archive.is_file():
        pytest.skip(f"{archive} is not there: llama.cpp was built from a source tree")
    directory = tmp_path_factory.mktemp("sdist")
    prefix = f"{archive.name.removesuffix('.tar.gz')}/vendor/llama.cpp/"
    with tarfile.open(archive) as sdist:
        wanted = [m for m in sdist if m.name.startswith(prefix) and not m.name.endswith(".gguf")]
        sdist.extractall(directory, wanted)
    (directory / prefix / ".git").unlink()  # of the repository that the sdist was made from
    return directory / prefix


@pytest.fixture
def tree(pristine: Path, tmp_path: Path) -> Path:
    """The upstream files that the hooks touch, to be changed."""
    copy = tmp_path / "llama.cpp"
    for name in ALL_HOOKED:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pristine / name, copy / name)
    return copy


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    """A whole source tree of the user's; its files are replaced, not written to."""
    return Path(shutil.copytree(pristine, tmp_path / "users", copy_function=os.link))


def replace_text(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text)


def cmake(tmp_path: Path, code: str, check: bool = True) -> str:
    """What a CMake script with the project's functions says; its FATAL_ERROR unless `check`."""
    script = tmp_path / "script.cmake"
    script.write_text(PRELUDE + code)
    scripts = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
    program = shutil.which("cmake", path=scripts)
    assert program
    finished = subprocess.run(
        [program, "-P", str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (finished.returncode == 0) == check, finished.stderr
    # CMake breaks its messages into lines.
    return " ".join((finished.stdout + finished.stderr).split())


def apply_hooks(tmp_path: Path, tree: Path, check: bool = True) -> str:
    return cmake(tmp_path, f'pt2_apply_hooks("{tree}")\n', check)


def bring_source(tmp_path: Path, source: Path, check: bool = True) -> str:
    """Into tmp_path / "copy"."""
    code = f'set(PT2_LLAMA_CPP_SOURCE "{source}")\npt2_bring_source("{tmp_path}/copy")\n'
    return cmake(tmp_path, code, check)


def contents(tree: Path) -> dict[str, bytes]:
    return {name: (tree / name).read_bytes() for name in ALL_HOOKED}


def files_of(tree: Path) -> set[str]:
    return {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}


def test_hooks_apply_once(tmp_path: Path, tree: Path) -> None:
    before = contents(tree)
    said = apply_hooks(tmp_path, tree)
    assert [hook.name for hook in HOOKS if f"Applied {hook.name}" in said] == [
        hook.name for hook in HOOKS
    ]
    patched = contents(tree)
    assert [name for name in ALL_HOOKED if patched[name] == before[name]] == []

    assert "Applied" not in apply_hooks(tmp_path, tree)
    assert contents(tree) == patched


def test_hooks_ignore_a_repository_around_the_tree(tmp_path: Path, tree: Path) -> None:
    """git apply skips files outside of what it takes for its repository, and reports success."""
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    before = contents(tree)
    apply_hooks(tmp_path, tree)
    assert [name for name, data in contents(tree).items() if data == before[name]] == []


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name)
def test_a_changed_upstream_line_is_named(tmp_path: Path, tree: Path, hook: Path) -> None:
    name = hooked_files(hook)[-1]
    first_context = re.search(
        rf"^\+\+\+ b/{re.escape(name)}\n@@.*@@.*\n (.*\S.*)$", hook.read_text(), re.MULTILINE
    )
    assert first_context
    path = tree / name
    lines = path.read_text().split("\n")
    assert first_context[1] in lines
    path.write_text("\n".join(f"{x} changed" if x == first_context[1] else x for x in lines))
    said = apply_hooks(tmp_path, tree, check=False)
    assert f"{hook.name} does not fit {tree}" in said
    assert f"llama.cpp at commit {PIN['COMMIT']}" in said
    assert re.search(rf"patch failed: {re.escape(name)}:\d+", said)


def test_the_pin_has_its_digest(tmp_path: Path, pristine: Path, tree: Path) -> None:
    code = f'pt2_tree_digest("{pristine}" digest)\nmessage(STATUS "digest=${{digest}}")\n'
    assert f"digest={PIN['DIGEST']}" in cmake(tmp_path, code)


def test_a_tree_at_the_pin_is_accepted(tmp_path: Path, source: Path) -> None:
    """All of it is copied but what building and git have left there, by their names."""
    expected = {name for name in files_of(source) if not name.startswith("build")}
    assert "cmake/build-info.cmake" in expected
    for left in (".git/HEAD", "build/CMakeCache.txt", "build-cuda/CMakeCache.txt"):
        (source / left).parent.mkdir()
        (source / left).touch()
    bring_source(tmp_path, source)
    copy = tmp_path / "copy"
    assert files_of(copy) == expected

    # It is not copied again, but for another tree or other hooks.
    (copy / "mark").touch()
    bring_source(tmp_path, source)
    assert (copy / "mark").exists()
    other = source.rename(tmp_path / "moved")
    bring_source(tmp_path, other)
    assert not (copy / "mark").exists()


@pytest.mark.parametrize("name", ["with spaces", "c++", "llama (1)"])
def test_a_tree_may_lie_anywhere(tmp_path: Path, source: Path, name: str) -> None:
    place = tmp_path / name
    place.mkdir()
    (source / "build").mkdir()
    (source / "build" / "CMakeCache.txt").touch()
    bring_source(tmp_path, source.rename(place / "llama.cpp"))
    assert not (tmp_path / "copy" / "build").exists()


def test_a_patched_tree_at_the_pin_is_accepted(tmp_path: Path, source: Path) -> None:
    """The digest leaves out the files that the hooks change, and hooks apply once."""
    for name in ALL_HOOKED:
        replace_text(source / name, (source / name).read_text())  # a copy, not the link
    assert "Applied" in apply_hooks(tmp_path, source)
    bring_source(tmp_path, source)
    assert "Applied" not in apply_hooks(tmp_path, tmp_path / "copy")


def test_a_tree_that_is_not_at_the_pin_is_refused(tmp_path: Path, source: Path) -> None:
    changed = source / "src" / "llama-graph.cpp"
    assert "src/llama-graph.cpp" not in ALL_HOOKED
    replace_text(changed, changed.read_text() + "// one line more\n")
    said = bring_source(tmp_path, source, check=False)
    assert f"{source} is not llama.cpp at commit {PIN['COMMIT']}" in said
    assert PIN["DIGEST"] in said
    assert not (tmp_path / "copy").exists()
    assert not (tmp_path / "copy.complete").exists()


def test_a_directory_that_is_no_source_tree_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = bring_source(tmp_path, tmp_path / "empty", check=False)
    assert f"{tmp_path / 'empty'} is not a llama.cpp source tree" in said
    assert "ggml/include/ggml.h" in said


def test_a_tree_that_no_build_made_is_left_alone(tmp_path: Path, source: Path) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "precious.txt").write_text("mine")
    said = bring_source(tmp_path, source, check=False)
    assert "exists and was not made by this build" in said
    assert (tmp_path / "copy" / "precious.txt").read_text() == "mine"
