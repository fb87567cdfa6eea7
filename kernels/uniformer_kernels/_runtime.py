"""The one place that asks the environment what it is, and which implementation is to run.

An operator says which backends it has on which device, the default first; `serving` picks one.
"""

import contextlib
import ctypes
import importlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from uniformer_kernels import _native

__all__ = [
    "BACKENDS", "announce", "autocast_dtype", "backend", "check_dtypes", "check_shapes",
    "current_backend", "forward_mode", "functorch_is_active", "has_wgmma", "int64s",
    "interpreting", "is_transformed", "library", "multiprocessors", "native", "native_library",
    "on_device", "parallel_for", "pointer", "product_dtype", "register", "report", "serving",
    "shared_memory", "triton_kernels", "tuned", "under_torch_func", "why_not",
]  # fmt: skip

log = logging.getLogger("uniformer.kernels")

SYMBOL = {"native": "uniformer_dwconv3d_bwd_weight", "cuda": "uniformer_dwconv3d_fwd_cuda"}
BACKENDS = ("auto", "reference", "triton", "cuda", "native")


def _checked(name: str, what: str = "the backend") -> str:
    if name not in BACKENDS:
        raise ValueError(f"{what} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


# A mistake in it is told where an operator is to run, not to everyone who imports this.
_current = os.environ.get("UNIFORMER_BACKEND") or "auto"


def current_backend() -> str:
    """The backend asked for: `UNIFORMER_BACKEND`, or the innermost `backend(...)`.

    Raises:
        ValueError: it is none of `BACKENDS`.
    """
    return _current if _current in BACKENDS else _checked(_current, "UNIFORMER_BACKEND")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose how the operators run, for the whole process, while the context lasts.

    Args:
        name: "auto", the best there is for each tensor; "reference", the formula of the paper in
            plain PyTorch; "triton"; "cuda", C++ for the GPU; "native", C++ for the CPU. An operator
            without such an implementation runs as with "auto": `uniformer doctor` shows which have.

    Raises:
        ValueError: `name` is none of these.
        RuntimeError: it cannot run here; the text says why.
    """
    global _current
    _checked(name)
    if why := why_not(name):
        raise RuntimeError(f"backend {name!r} cannot run here: {why}")
    before, _current = _current, name
    try:
        yield
    finally:
        _current = before


# --- Which implementation serves ------------------------------------------------------

_SERVES: dict[str, Mapping[str, tuple[str, ...]]] = {}
_announced: set[tuple[str, str]] = set()


def register(op: str, serves: Mapping[str, tuple[str, ...]]) -> None:
    """Say which backends an operator has, by type of device, the default first."""
    _SERVES[op] = serves


def serving(op: str, device: torch.device) -> str:
    """The backend that runs `op` on `device` now.

    Raises:
        ValueError: the backend asked for does not run on that device.
        RuntimeError: it cannot run here.
    """
    asked, serves = current_backend(), _SERVES[op]
    if asked == "reference":
        return asked
    if asked != "auto" and any(asked in names for names in serves.values()):
        if asked not in serves.get(device.type, ()):
            raise ValueError(f"backend {asked!r} does not run {op} on {device.type} tensors")
        if why := why_not(asked):
            raise RuntimeError(f"backend {asked!r} cannot run here: {why}")
        return asked
    chosen, why = _default(serves, device.type)
    if why:
        announce(f"{op} runs on PyTorch's own operators, slower than it could", why)
    return chosen


def _default(serves: Mapping[str, tuple[str, ...]], device: str) -> tuple[str, str | None]:
    """The backend for "auto", and why it is not the best, if so."""
    names = serves.get(device, ("reference",))
    why = why_not(names[0])
    if why is None:
        return names[0], None
    anywhere = next((name for name in names if name not in BACKENDS), "reference")
    return anywhere, f"{names[0]} cannot run here: {why}"


def under_torch_func(op: str) -> bool:
    """Whether a transform of torch.func is at work, or forward-mode differentiation, or the tracer
    of torch.jit: an operator's gradient bears none of them."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._get_tracing_state() is not None:
        return True  # what is traced is PyTorch's, as in DepthwiseConv3d
    if not is_transformed():
        return False
    why = "neither torch.func nor forward-mode differentiation bears its operators"
    announce(f"{op} runs in plain PyTorch, slower than it could", why)
    return True


def is_transformed() -> bool:
    """Whether a transform of torch.func, forward-mode differentiation or torch.jit's tracer is at
    work."""
    traced = torch._C._get_tracing_state() is not None
    return traced or functorch_is_active() or forward_ad._current_level >= 0


def forward_mode() -> bool:
    """Whether tensors may carry tangents."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def functorch_is_active() -> bool:
    """Whether tensors may be those of vmap or grad, which have no memory of their own."""
    return torch._C._are_functorch_transforms_active()


def announce(what: str, why: str) -> None:
    """Log once that something runs otherwise than asked for or expected."""
    if (what, why) not in _announced:
        _announced.add((what, why))
        log.warning("%s: %s", what, why)


def report() -> list[tuple[str, str, str, dict[str, str | None]]]:
    """For `uniformer doctor`: operator, device, what serves it, and why each other cannot run."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    rows = []
    for op, serves in sorted(_SERVES.items()):
        for device in devices:
            try:
                served_by = serving(op, torch.device(device))
            except (ValueError, RuntimeError) as error:
                served_by = f"nothing: {error}"
            names = (n for n in serves.get(device, ()) if n in BACKENDS)
            rows.append((op, device, served_by, {n: why_not(n) for n in names}))
    return rows


@torch.compiler.assume_constant_result
def why_not(name: str) -> str | None:
    """Why a backend cannot run here, or None."""
    if name == "triton":
        return _why_not_triton()
    if name in ("cuda", "native"):
        return native_library(name)[1]
    return None


@cache
def _why_not_triton() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton is not installed ({error})"
    if torch.cuda.is_available() or interpreting():
        return None
    return "there is no CUDA device (TRITON_INTERPRET=1 runs it on the CPU, to test)"


def triton_kernels(op: str) -> ModuleType:
    """An operator's, where they are first needed: not every machine has Triton."""
    return importlib.import_module(f"uniformer_kernels.{op}_triton")


# --- What comes in --------------------------------------------------------------------


def check_dtypes(x: torch.Tensor, **parameters: torch.Tensor | None) -> None:
    """Raise ValueError unless x is floating point and the parameters are of its dtype or fp32."""
    if not isinstance(x, torch.Tensor) or x.dtype not in _FLOATS:
        raise ValueError(
            f"x must be a tensor in fp32, fp16, bf16 or fp64, got {x.dtype} in a {type(x).__name__}"
        )
    for name, t in parameters.items():
        if t is None:
            continue
        if not isinstance(t, torch.Tensor):
            raise ValueError(f"{name} must be a tensor or None, got {type(t).__name__}")
        if t.dtype not in (x.dtype, torch.float32) and t.dtype != autocast_dtype(x):
            raise ValueError(f"{name} must be of x's dtype or fp32, got {t.dtype} for x {x.dtype}")


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """What autocast would cast x to, if it is enabled."""
    device = x.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """In which products of x are made: autocast's, which leaves fp64 alone, or x's own."""
    cast = autocast_dtype(x)
    return x.dtype if cast is None or x.dtype == torch.float64 else cast


def check_residual(residual: bool) -> None:
    """Raise ValueError unless it is True or False: x is the residual, or there is none."""
    if not isinstance(residual, bool):
        raise ValueError(f"residual must be True or False, to add x, got {type(residual).__name__}")


def check_shapes(x: torch.Tensor, shapes: Mapping[str, tuple]) -> None:
    """Raise ValueError unless each tensor, by name, has its shape and lies on x's device."""
    for name, (t, shape) in shapes.items():
        if t is None:
            continue
        if not isinstance(t, torch.Tensor):
            raise ValueError(f"{name} must be a tensor or None, got {type(t).__name__}")
        if t.shape != shape:
            raise ValueError(
                f"{name} must be {tuple(shape)} for x {tuple(x.shape)}, got {tuple(t.shape)}"
            )
        if t.device != x.device:
            raise ValueError(f"{name} must be on x's device, got {t.device} and {x.device}")


# --- Devices --------------------------------------------------------------------------


def interpreting() -> bool:
    """Whether Triton interprets its kernels, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Launch on `x`'s GPU: Triton otherwise launches on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def multiprocessors(x: torch.Tensor) -> int:
    """Of `x`'s GPU; a few for the interpreter."""
    if not x.is_cuda:
        return 2
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def shared_memory(x: torch.Tensor) -> int:
    """Bytes that a program may have of `x`'s GPU; the most there are for the interpreter."""
    if not x.is_cuda:
        return 2**20
    properties: Any = torch.cuda.get_device_properties(x.device)  # stubs lack the attribute
    return properties.shared_memory_per_block_optin


def has_wgmma(x: torch.Tensor) -> bool:
    """Whether products on `x`'s GPU read their operands from shared memory, as Hopper's do."""
    return not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] >= 9


# --- What was measured ----------------------------------------------------------------

TUNED = Path(__file__).with_name("tuned.json")  # written by benchmarks/tune.py
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_FLOATS = frozenset((*DTYPES.values(), torch.float64))

Row = Mapping[str, Any]


def tuned(op: str, key: tuple, device: torch.device) -> Row | None:
    """The fastest backend and launch of `op` on this kind of GPU, where they were measured.

    `key` is what is written in the file, word by word: "fwd 5x5x5 bf16 64 8x56x56" is
    ("fwd", (5, 5, 5), torch.bfloat16, 64, (8, 56, 56)).
    """
    return _tuned_on(device).get((op, key))


@cache
def _tuned_on(device: torch.device) -> dict[tuple, Row]:
    # AMD's capabilities are numbered as NVIDIA's are, and mean others.
    if device.type != "cuda" or torch.version.hip or interpreting():
        return {}
    major, minor = torch.cuda.get_device_capability(device)
    try:
        return _read_tuned(f"sm_{major}{minor}")
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        why = f"{TUNED} is not as benchmarks/tune.py writes it ({type(error).__name__}: {error})"
        announce("kernels are launched untuned", why)
        return {}


def _read_tuned(arch: str) -> dict[tuple, Row]:
    tables = json.loads(TUNED.read_text()).get(arch, {})
    return {
        (op, tuple(map(_word, key.split()))): _checked_row(key, row)
        for op, rows in tables.items()
        if op != "environment"
        for key, row in rows.items()
    }


def _word(word: str) -> Any:
    if not re.fullmatch(r"\d+(x\d+)*", word):
        return DTYPES.get(word, word)
    sizes = tuple(map(int, word.split("x")))
    return sizes if len(sizes) > 1 else sizes[0]


def _checked_row(key: str, row: Row) -> Row:
    """Sizes that Triton's compiler would stumble over are found here, not at a launch."""
    sizes = {name: n for name, n in row.items() if name not in ("backend", "ms", "rival_ms")}
    whole = all(type(n) is int and n > 0 for n in sizes.values())
    powers = [n for name, n in sizes.items() if name.startswith("BLOCK_") or name == "warps"]
    if (
        row["backend"] not in ("triton", "cuda", "sdpa", "apart")
        or not whole
        or any(n & (n - 1) for n in powers)
    ):
        raise ValueError(f"{key!r} is {dict(row)}")
    return row


# --- The native libraries -------------------------------------------------------------


@cache
def native_library(name: str) -> tuple[ctypes.CDLL | None, str | None]:
    """The library of `csrc/` for "native" (CPU) or "cuda", or why there is none.

    It is taken from the package where it was built with it, else built once and kept in
    ~/.cache/uniformer (or under XDG_CACHE_HOME).
    """
    try:
        if name == "cuda":
            if not torch.cuda.is_available():
                return None, "there is no CUDA device"
            major, minor = torch.cuda.get_device_capability()
            command = _native.cuda_command(os.environ.get("CUDA_HOME"), f"{major}{minor}")
        else:
            command = _native.cpu_command(os.environ.get("CXX"))
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uniformer"
        library = ctypes.CDLL(str(_native.library(name, command, cache)))
        getattr(library, SYMBOL[name])
        return library, None
    except (RuntimeError, OSError, AttributeError) as error:  # no home folder is a RuntimeError
        return None, str(error)


def library(name: str) -> ctypes.CDLL:
    """The library "native" or "cuda".

    Raises:
        RuntimeError: there is none here; the text says why.
    """
    found, why = native_library(name)
    if found is None:
        raise RuntimeError(f"backend {name!r} cannot run here: {why}")
    return found


def pointer(t: torch.Tensor | None) -> ctypes.c_void_p:
    """Where a tensor's elements begin, as C takes it."""
    return ctypes.c_void_p(None if t is None else t.data_ptr())


@lru_cache(maxsize=4096)
def int64s(values: tuple[int, ...]) -> ctypes.Array:
    """Sizes or strides, as C takes them, to be read alone: calls share them."""
    return (ctypes.c_int64 * len(values))(*values)


@cache
def native(name: str, arguments: str) -> Any:
    """A function of the library "native" that takes Python's numbers as they are.

    `arguments` has a letter for each: p for a pointer, q for 64 bits, i for 32, f for a float.

    Raises:
        RuntimeError: there is no such library here; the text says why.
    """
    function = getattr(library("native"), name)
    function.argtypes = [_C_TYPES[letter] for letter in arguments]
    return function


_C_TYPES = {
    "p": ctypes.c_void_p, "q": ctypes.c_int64, "i": ctypes.c_int32, "f": ctypes.c_float
}  # fmt: skip


@cache
def parallel_for() -> int:
    """PyTorch's own threads, the address of a C function: a second pool would fight with them."""
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    prefix = "" if sys.platform == "win32" else "lib"
    path = Path(torch.__file__).parent / "lib" / f"{prefix}torch_cpu.{suffix}"
    function = ctypes.CDLL(str(path)).torch_parallel_for
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address
