"""Matrix products some rows at a time: what is between two of them stays in the cache.

So a CPU runs `pointwise` and `ffn` backward, and forward where `products_native.py` does not serve;
and a GPU in fp32, for which it has no tensor cores.

PyTorch's own products run at 195 GFLOP/s on 1,024 rows whose result is written over the last one's
and at 137 on all 25,088 of them, whose 26 MB are fetched from the system and given back each time;
an erf-GELU takes 2 ms instead of 8 (two threads, fp32, 64 to 256 channels).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from uniformer_kernels import _runtime, products_native
from uniformer_kernels._norm import Norm, Prologue, Sums

__all__ = [
    "Chunks", "accumulate", "compute_dtype", "fitted", "normalises_rows", "prepare", "product",
    "product_into", "serves", "some", "spread", "summed", "through_norm",
]  # fmt: skip

ROWS = {2: 4096, 4: 1024, 8: 512}  # by bytes an element; 16-bit products want more to start well
GPU_ROWS = 2**16


def compute_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """In which products are made: a CPU has no instructions for fp16, nor a library."""
    return torch.float32 if dtype == torch.float16 and not x.is_cuda else dtype


def prepare(op: str, x: Tensor, norm: Norm | None) -> tuple[torch.dtype, bool]:
    """In which dtype products of x are to be made, and whether in plain PyTorch."""
    known = x.device.type in ("cpu", "cuda")
    plain = not known or x.numel() == 0 or _runtime.current_backend() == "reference"
    # The Triton kernels make no statistics; on a GPU PyTorch's own LayerNorm does.
    plain |= norm is not None and norm.per_row and not normalises_rows(x)
    return _runtime.product_dtype(x), plain or _runtime.under_torch_func(op)


def normalises_rows(x: Tensor) -> bool:
    """Whether `pointwise` and `ffn` make a LayerNorm of the rows of x as they read these, as on a
    CPU. On a GPU it takes a pass, which `dwconv3d_norm` spares."""
    return x.device.type == "cpu" and _runtime.serving("pointwise", x.device) != "triton"


def serves(op: str, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether `op` is to go in chunks through the library's products, in `dtype`."""
    if _runtime.serving(op, x.device) != "triton" or dtype == torch.float64:
        return True
    if x.is_cuda and dtype.itemsize > 2 and _runtime.current_backend() == "auto":
        why = f"products of {dtype} have no tensor cores; torch.autocast makes them in 16 bits"
        _runtime.announce(f"{op} runs on PyTorch's products, slower than it could", why)
        return True
    return False


def spread(scale: Tensor | None, rows: int) -> Tensor | None:
    """A number for each clip (B,) -> for each row (M, 1)."""
    if scale is None:
        return None
    return scale.repeat_interleave(rows // len(scale)).unsqueeze(1)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """x (M, K) times weight (K, N), plus bias (N,), in the first rows of `buffer`."""
    out = buffer[: len(x)]
    if bias is None:
        return torch.mm(x, weight, out=out)
    return torch.addmm(bias, x, weight, out=out)


def product_into(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor,
    residual: Tensor | None = None, scale: Tensor | None = None,
) -> None:  # fmt: skip
    """y = residual + scale * product, by way of `buffer` where y is of another dtype."""
    direct = y.dtype == x.dtype
    if residual is not None and direct and scale is None and y.itemsize == 2:
        # The product is added as it is made: in 16 bits 1.1x to 1.2x as fast, in fp32 no faster.
        y.copy_(residual) if bias is None else torch.add(residual, bias, out=y)
        y.addmm_(x, weight)
        return
    out = product(x, weight, bias, y if direct else buffer)
    if scale is not None:
        out.mul_(scale)
    if residual is not None:
        torch.add(residual, out, out=y)
    elif not direct:
        y.copy_(out)


def some(t: Tensor | None, rows: slice) -> Tensor | None:
    """Those rows, of what there may be."""
    return None if t is None else t[rows]


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the product of a and b to a total that may be more exact than they are."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def summed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (M, N) -> (N,), added up in `dtype`, no less exact than x."""
    found = products_native.column_sums(x) if dtype == torch.float32 else None
    return x.sum(0, dtype=dtype) if found is None else found


class Chunks:
    """Rows of x in `dtype`, some at a time: xhat, or x itself where there is no norm; of a
    LayerNorm gamma * xhat + beta.

    Iterating gives (rows, their xhat). All chunks share the memory of the first, and so do the
    intermediate results for which `buffer` lays it out: none is fetched from the system again.
    """

    def __init__(self, norm: Prologue | None, x: Tensor, dtype: torch.dtype) -> None:
        self.norm, self.x, self.dtype = norm, x, dtype
        self.per_row = norm is not None and norm.mean is None
        if norm is not None and self.per_row:
            self.affine = norm.gamma.to(x.dtype), norm.beta.to(x.dtype)
            self.of_gamma, self.of_beta = torch.zeros_like(norm.gamma), torch.zeros_like(norm.beta)
        parts = max(len(x) // (GPU_ROWS if x.is_cuda else ROWS[dtype.itemsize]), 1)
        self.step = -(-len(x) // parts)  # alike: a short last chunk starves the threads

    def sums(self, G: Tensor, db: Tensor, weight: Tensor) -> Sums:
        """What the gradients of the product's weight, of xhat, and bias tell, after all rows."""
        if self.per_row:
            return Sums(G, self.of_gamma, self.of_beta)
        return Sums.of(G, db, weight, self.norm)

    def buffer(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """For a chunk's rows of `width` elements."""
        return self.x.new_empty(self.step, width, dtype=dtype or self.dtype)

    def gradient(self, dy: Tensor, scale: Tensor | None) -> Tensor:
        """Of the product, from that of the result, in the product's dtype."""
        return (dy if scale is None else dy * scale).to(self.dtype)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        norm, x, width = self.norm, self.x, self.x.shape[1]
        wide = narrow = shift = x
        if norm is not None and not self.per_row:
            wide, shift = self.buffer(width, norm.rstd.dtype), -norm.mean * norm.rstd
        if wide.dtype != self.dtype:
            narrow = self.buffer(width)
        for first in range(0, len(x), self.step):
            rows = slice(first, min(first + self.step, len(x)))
            part = x[rows]
            if norm is not None and self.per_row:
                part, *self.stats = torch.native_layer_norm(part, (width,), *self.affine, norm.eps)
            elif norm is not None:  # one multiplication and one addition
                part = torch.addcmul(shift, part, norm.rstd, out=wide[: len(part)])
            if part.dtype != self.dtype:
                part = narrow[: len(part)].copy_(part)
            yield rows, part

    def through_rows(self, rows: slice, g: Tensor) -> Tensor:
        """Of the chunk at hand, from g, the gradient of the LayerNorm's result, that of x.

        What it adds to the gradients of gamma and beta goes into `of_gamma` and `of_beta`.
        """
        x = self.x[rows]
        dx, dgamma, dbeta = torch.ops.aten.native_layer_norm_backward(
            g.to(x.dtype), x, x.shape[1:], *self.stats, *self.affine, [True, True, True]
        )
        self.of_gamma += dgamma
        self.of_beta += dbeta
        return dx


def through_norm(
    g: Tensor, x: Tensor, norm: Prologue, sums: Sums, group: str, more: Tensor | None
) -> None:
    """g (M, C), the gradient of xhat, becomes that of x, and `more` is added."""
    shift, slope = sums.through(norm, len(x), group)
    chunks = Chunks(None, x, x.dtype)
    buffer = chunks.buffer(x.shape[1], norm.mean.dtype)
    for rows, part in chunks:
        d = torch.sub(part, norm.mean, out=buffer[: len(part)])
        if g.dtype == d.dtype:
            g[rows].sub_(shift).mul_(norm.rstd).addcmul_(d, slope)
        else:
            g[rows] = (g[rows] - shift) * norm.rstd + d * slope
        if more is not None:
            g[rows] += more[rows]


def fitted(found: Tensor | None, like: Tensor, wanted: bool) -> Tensor:
    """A gradient in `like`'s shape and dtype; without elements where it is not wanted."""
    if not wanted or found is None:
        return like.new_empty(0)
    return found.view(like.shape).to(like.dtype)
