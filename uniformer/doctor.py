"""What runs here, on what, and why."""

import platform
from dataclasses import dataclass

import torch

from uniformer_kernels import current_backend, report, why_not

__all__ = ["DoctorConfig", "check_backend", "doctor"]

WORDS = {
    "native": "C++", "triton": "Triton", "cuda": "CUDA C++", "sdpa": "PyTorch's fused attention",
    "chunked": "PyTorch's matrix products, some rows at a time", "reference": "plain PyTorch",
}  # fmt: skip
_PRODUCTS = (
    "forward, in fp32 with AVX-512 and bf16 with AVX512_BF16 (but not AMX), of multiples of 8 "
    "channels in and out; else, and backward, PyTorch's matrix products, some rows at a time"
)
# Where it depends on the tensor, too.
NOTES = {
    (
        "attention",
        "native",
    ): "of a packed qkv, in fp32 with AVX-512 and bf16 with AVX512_BF16, "
    "heads of 16, 32, 48 or 64 channels, no dropout; else PyTorch's fused attention",
    ("attention", "sdpa"): "or Triton where benchmarks/tune_attention.py found it faster",
    ("dwconv3d", "native"): "weight gradients, and, of kernels 3 or 5 wide and multiples of 16 "
    "channels, all else (in fp32 with AVX-512); PyTorch's channels-last convolution otherwise",
    ("ffn", "native"): _PRODUCTS,
    ("ffn", "triton"): "up to 128 channels and in 16 bits; else PyTorch's matrix products",
    ("patch_embed", "reference"): "whose convolution is as fast on a CPU",
    ("pointwise", "native"): _PRODUCTS,
    ("pointwise", "triton"): "in 16 bits; a LayerNorm, and fp32, are left to PyTorch",
}


@dataclass
class DoctorConfig:
    """Settings of `uniformer doctor`: there are none."""


def check_backend() -> None:
    """Raise ValueError unless the backend that UNIFORMER_BACKEND asks for exists and runs here."""
    if why := why_not(asked := current_backend()):
        raise ValueError(f"UNIFORMER_BACKEND is {asked}, which cannot run here: {why}")


def doctor(cfg: DoctorConfig) -> None:
    """Say which implementation serves which operator here, and why not the others.

    Raises:
        ValueError: UNIFORMER_BACKEND is no backend.
    """
    asked = current_backend()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} CPU threads, GPU: {gpu}"
    )
    if asked != "auto":
        print(f"UNIFORMER_BACKEND asks for {asked}; operators without it run as with auto")
    print(f"{'operator':<12}{'device':<8}served by")
    for op, device, served_by, others in report():
        note = NOTES.get((op, served_by), "")
        print(f"{op:<12}{device:<8}{served_by}: {WORDS.get(served_by, '')} {note}".rstrip(": "))
        for name, why in others.items():
            if name not in (served_by, asked):
                print(f"{'':<20}not {name}: {why or 'it runs when asked for'}")
    if asked == "auto":
        print("UNIFORMER_BACKEND, or uniformer_kernels.backend(...), asks for another")
