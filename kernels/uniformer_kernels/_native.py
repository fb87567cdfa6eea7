"""Builds the C++ and CUDA sources of `csrc/` into shared libraries, each once.

The libraries have a plain C interface and need nothing of PyTorch, so that one compiler call makes
each and any version of PyTorch loads it. `setup.py` calls this too: it must not import torch.
"""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["BuildError", "compile_library", "cpu_command", "cuda_command", "library", "sources"]

log = logging.getLogger("uniformer.kernels")

HERE = Path(__file__).parent
# Installed, the sources lie in the package; in a checkout, at its root.
SOURCES = HERE / "csrc" if (HERE / "csrc").is_dir() else HERE.parents[1] / "csrc"
BUILDING = "building-"  # folders of compilers at work
SUFFIX = {"native": ".cpp", "cuda": ".cu"}  # every such source of the folder is compiled in


class BuildError(RuntimeError):
    """There is no compiler, or it failed; the text says which."""


def cpu_command(compiler: str | None = None) -> list[str]:
    """The C++ compiler and its flags; `compiler` instead of the usual ones.

    Raises:
        BuildError: there is none.
    """
    names = [shlex.split(compiler)] if compiler else [["c++"], ["g++"], ["clang++"]]
    found = next((name for name in names if shutil.which(name[0])), None)
    if found is None:
        tried = ", ".join(" ".join(name) for name in names)
        raise BuildError(f"there is no C++ compiler ({tried}); CXX may name one")
    return [*found, "-std=c++17", "-O3", "-march=native", "-shared", "-fPIC"]


def cuda_command(home: str | None, arch: str) -> list[str]:
    """nvcc and its flags for compute capability `arch`, as in "90".

    Raises:
        BuildError: there is no nvcc.
    """
    found = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if found is None:
        raise BuildError("there is no nvcc on the PATH; CUDA_HOME may say where it is")
    flags = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC"]
    return [found, *flags, "-gencode", f"arch=compute_{arch},code=sm_{arch}"]


def sources(name: str) -> list[Path]:
    """What the library "native" or "cuda" is made from.

    Raises:
        BuildError: it is missing.
    """
    found = sorted(SOURCES.glob(f"*{SUFFIX[name]}"))
    if not found:
        raise BuildError(f"its sources are missing: {SOURCES}/*{SUFFIX[name]}")
    return found


def library(name: str, command: Sequence[str], cache: Path) -> Path:
    """The library, from the package or from `cache`, built if it is in neither.

    Raises:
        BuildError: it cannot be built.
    """
    packaged = HERE / f"lib{name}.so"
    if packaged.is_file() and SOURCES.parent == HERE:  # in a checkout sources change
        return packaged
    files = sources(name)
    headers = sorted(SOURCES.glob("*.h"))
    parts = [*(f.read_bytes() for f in files + headers), *(c.encode() for c in command)]
    parts.append(_machine().encode())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    built = cache / f"lib{name}-{key}.so"
    if not _is_whole(built):
        log.warning(
            "building lib%s with %s, once, for some 20 seconds, into %s", name, command[0], cache
        )
        compile_library(files, command, built)
    return built


def _is_whole(built: Path) -> bool:
    """Whether a library is as it was built: loading half of one would end the process."""
    digest = _digest_of(built)
    if not (built.is_file() and digest.is_file()):
        return False
    return digest.read_text() == hashlib.sha256(built.read_bytes()).hexdigest()


def _digest_of(built: Path) -> Path:
    return built.with_suffix(".sha256")


def compile_library(files: Sequence[Path], command: Sequence[str], built: Path) -> None:
    """Build `built`, whole or not at all: a killed build leaves nothing that is in the way.

    Raises:
        BuildError: ninja or the compiler is missing or fails; the text ends with its last lines.
    """
    try:
        from ninja import BIN_DIR
        from ninja.ninja_syntax import Writer
    except ImportError as error:
        raise BuildError("ninja is not installed: pip install ninja") from error
    names = ", ".join(f.name for f in files)
    built.parent.mkdir(parents=True, exist_ok=True)
    for left in built.parent.glob(f"{BUILDING}*"):  # by a process that was killed
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=BUILDING, dir=built.parent) as folder:
        with (Path(folder) / "build.ninja").open("w") as file:
            writer = Writer(file)  # type: ignore[arg-type]  # its annotation is wrong
            linker = " ".join(f"'{part}'" for part in command)
            compiler = " ".join(f"'{part}'" for part in command if part != "-shared")
            writer.rule("compile", f"{compiler} -c -o $out $in", description="$in")
            writer.rule("link", f"{linker} -o $out $in", description="$out")
            objects = [f"{file.name}.o" for file in files]
            for path, compiled in zip(files, objects, strict=True):
                writer.build([compiled], "compile", [str(path)])
            writer.build(["library"], "link", objects)
        done = subprocess.run(
            [os.path.join(BIN_DIR, "ninja"), "-C", folder, "library"],
            capture_output=True, text=True, errors="replace",
        )  # fmt: skip
        if done.returncode:
            last = " | ".join(done.stdout.strip().splitlines()[-6:])
            raise BuildError(f"{command[0]} failed on {names}: {last}")
        made = Path(folder) / "library"
        if not made.is_file():
            raise BuildError(f"{command[0]} succeeded on {names} but wrote no library")
        digest = Path(folder) / "digest"
        digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        os.replace(digest, _digest_of(built))
        os.replace(made, built)


def _machine() -> str:
    """What code for this very processor depends on: a home folder may serve several."""
    flags = ""
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
