"""Matrix products on a CPU, some rows at a time: what is between two of them stays in the cache.

PyTorch's own products run at 195 GFLOP/s on 1,024 rows whose result is written over the last one's
and at 137 on all 25,088 of them, whose 26 MB are fetched from the system and given back each time;
an erf-GELU takes 2 ms instead of 8 (two threads, fp32, 64 to 256 channels).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from uniformer_kernels._norm import Prologue, Sums

__all__ = [
    "Normalised", "accumulate", "chunks", "compute_dtype", "per_row", "product", "through_norm",
]  # fmt: skip

ROWS = {2: 4096, 4: 1024, 8: 512}  # by bytes an element; 16-bit products want more to start well


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which products are made: for fp16 there are no instructions, nor a library."""
    return torch.float32 if dtype == torch.float16 else dtype


def chunks(rows: int, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of `rows` rows."""
    step = ROWS[dtype.itemsize]
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def per_row(scale: Tensor | None, rows: int) -> Tensor | None:
    """A number for each clip (B,) -> for each row (M, 1)."""
    if scale is None:
        return None
    return scale.repeat_interleave(rows // len(scale)).unsqueeze(1)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x (M, K) times weight (K, N), plus bias (N,)."""
    if bias is None:
        return torch.mm(x, weight, out=out)
    return torch.addmm(bias, x, weight, out=out)


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the product of a and b to a total that may be more exact than they are."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


class Normalised:
    """Rows of x in `dtype`: xhat, or x itself where there is no norm."""

    def __init__(self, norm: Prologue | None, x: Tensor, dtype: torch.dtype) -> None:
        self.norm, self.x, self.dtype = norm, x, dtype
        self.shift = None if norm is None else -norm.mean * norm.rstd

    def __getitem__(self, rows: slice) -> Tensor:
        x = self.x[rows]
        if self.norm is not None:  # one multiplication and one addition
            x = torch.addcmul(self.shift, x, self.norm.rstd)
        return x.to(self.dtype)


def through_norm(g: Tensor, x: Tensor, norm: Prologue, sums: Sums, group: str) -> None:
    """g (M, C), the gradient of xhat, becomes that of x."""
    shift, slope = sums.through(norm, len(x), group)
    for rows in chunks(len(x), x.dtype):
        g[rows] = (g[rows] - shift).mul_(norm.rstd).addcmul_(x[rows] - norm.mean, slope)
