"""What the Triton kernels of `dwconv3d` share: runs along W, tiles, launches.

Lanes are BLOCK_P tiles by BLOCK_C channels. A program holds runs of NW positions along W, and the
NW + KW - 1 elements that these meet in a row serve all KW taps.
"""

# mypy: disable-error-code="assignment"

from collections.abc import Mapping
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from uniformer_kernels import _runtime

__all__ = [
    "Config",
    "Shape",
    "Tuned",
    "exists",
    "output_of",
    "packed",
    "place_of",
    "readable",
    "run_of",
    "sums_of",
    "tile_of",
    "tiling",
    "tuned_for",
]

# 2 channels a lane, on 4 warps. Where benchmarks/tune.py has timed a shape, what it found fastest
# is in tuned.json and goes before these.
BLOCK_P, BLOCK_C, WARPS = 4, 64, 4

Shape = tuple[int, ...]
Tuned = Mapping[str, Any]  # a row of tuned.json: NH, NW, BLOCK_P, BLOCK_C, warps, any of them


class Config(NamedTuple):
    """A launch: how many programs, and the arguments that say how they share the work."""

    grid: Shape
    arguments: dict[str, int]
    warps: int


def _run_length(W: int) -> int:
    """Elements along W that a program holds: 7 divides every width of the network at 224."""
    if W % 7 == 0:
        return 7
    return 8 if W >= 8 else W


def tile_of(shape: Shape, rows: int, tuned: Tuned | None) -> tuple[int, int, int, int, int]:
    """NH (`rows` by default), NW, BLOCK_P, BLOCK_C and warps, no larger than the shape needs."""
    *_, H, W, C = shape
    tuned = tuned or {}
    NH, NW = min(tuned.get("NH", rows), H), min(tuned.get("NW", _run_length(W)), W)
    block_c = min(tuned.get("BLOCK_C", BLOCK_C), max(triton.next_power_of_2(C), 8))
    # Few channels leave lanes for more tiles.
    block_p = tuned.get("BLOCK_P", max(BLOCK_P * BLOCK_C // block_c, 1))
    return NH, NW, block_p, block_c, tuned.get("warps", WARPS)


def tiling(
    shape: Shape, kernel: Shape, rows: int, tuned: Tuned | None
) -> tuple[dict[str, int], int]:  # fmt: skip
    """Arguments of a kernel of tiles of one frame, on x (B, T, H, W, C), and its warps."""
    B, T, H, W, C = shape
    NH, NW, block_p, block_c, warps = tile_of(shape, rows, tuned)
    tiles_h, tiles_w = triton.cdiv(H, NH), triton.cdiv(W, NW)
    arguments = {
        "T": T, "H": H, "W": W, "C": C, "tiles_h": tiles_h, "tiles_w": tiles_w,
        "tiles": B * T * tiles_h * tiles_w, "KT": kernel[0], "KH": kernel[1], "KW": kernel[2],
        "NH": NH, "NW": NW, "EVEN_W": W % NW == 0, "BLOCK_P": block_p, "BLOCK_C": block_c,
    }  # fmt: skip
    return arguments, warps


def packed(weight: Tensor) -> Tensor:
    """(C, 1, kt, kh, kw) -> (taps, C): lanes are channels."""
    return weight.flatten(1).t().contiguous()


def readable(x: Tensor) -> Tensor:
    """Channels side by side, other strides as they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def tuned_for(direction: str, x: Tensor, kernel: Shape) -> Tuned | None:
    """The row of tuned.json for x and a kernel."""
    key = (direction, kernel, x.dtype, x.shape[4], x.shape[1:4])
    return _runtime.tuned("dwconv3d", key, x.device)


@triton.jit
def run_of(
    at, mask, w0, W,
    FIRST: tl.constexpr, LAST: tl.constexpr, STRIDE: tl.constexpr,
    NW: tl.constexpr, EVEN_W: tl.constexpr,
):  # fmt: skip
    """Elements FIRST to LAST - 1 of a row, counted from column w0 at `at`; zeros outside."""
    run = ()
    for n in tl.static_range(FIRST, LAST):
        inside = mask
        if n < 0:
            inside = inside & (w0 + n >= 0)[:, None]
        if (n >= NW) or not EVEN_W:
            inside = inside & (w0 + n < W)[:, None]
        run = run + (tl.load(at + n * STRIDE, mask=inside, other=0.0).to(tl.float32),)
    return run


@triton.jit
def place_of(tile, T, tiles_h, tiles_w, NH: tl.constexpr, NW: tl.constexpr):
    """Of a tile's first output clip and frame in one, clip, frame, row and column."""
    w0 = tile % tiles_w * NW
    h0 = tile // tiles_w % tiles_h * NH
    bt = tile // tiles_w // tiles_h
    t, b = bt % T, (bt // T).to(tl.int64)
    return bt, b, t, h0, w0


@triton.jit
def exists(s: tl.constexpr, in_tiles, h0, w0, H, W, NW: tl.constexpr, EVEN_W: tl.constexpr):
    """Whether tiles have an output s: those beyond a frame's border are none."""
    return (in_tiles & (h0 + s // NW < H) & ((w0 + s % NW < W) | EVEN_W))[:, None]


@triton.jit
def output_of(
    sums, s: tl.constexpr, Bias, here, h0, stride_xh, c, in_c, mask,
    STRIDE_XW: tl.constexpr, RESIDUAL: tl.constexpr, NW: tl.constexpr,
):  # fmt: skip
    """Output s of `sums_of`, with bias and residual, in fp32; `here` is where its frame's column
    w0 lies in x."""
    y = sums[s]
    if Bias is not None:
        y += tl.load(Bias + c[None, :], mask=in_c, other=0.0).to(tl.float32)
    if RESIDUAL:
        at = here + ((h0 + s // NW).to(tl.int64) * stride_xh)[:, None] + s % NW * STRIDE_XW
        y += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def sums_of(
    corner, Weight, c, in_c, in_tiles, t, h0, w0, T, H, W, stride_xt, stride_xh,
    C: tl.constexpr, STRIDE_XW: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, MIRROR: tl.constexpr,
    NH: tl.constexpr, NW: tl.constexpr, EVEN_W: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Products of all taps, NH * NW sums of (BLOCK_P, BLOCK_C): outputs from (t, h0, w0) on.

    `corner` is where column w0 of a clip's first row and frame lies in x. Weight is
    (KT * KH * KW, C); MIRROR reads its taps from the last to the first.
    """
    acc = (tl.zeros([BLOCK_P, BLOCK_C], tl.float32),) * (NH * NW)
    for i in range(KT):
        from_t = t + i - KT // 2
        in_t = (from_t >= 0) & (from_t < T) & in_tiles
        frame = corner + (from_t.to(tl.int64) * stride_xt)[:, None]
        for r in tl.static_range(NH + KH - 1):
            from_h = h0 + r - KH // 2
            mask = (in_t & (from_h >= 0) & (from_h < H))[:, None] & in_c
            at = frame + (from_h.to(tl.int64) * stride_xh)[:, None]
            xs = run_of(at, mask, w0, W, -(KW // 2), NW + KW // 2, STRIDE_XW, NW, EVEN_W)
            for j in tl.static_range(KH):
                if (r - j >= 0) and (r - j < NH):
                    for k in tl.static_range(KW):
                        tap = (i * KH + j) * KW + k
                        tap = KT * KH * KW - 1 - tap if MIRROR else tap
                        weight = tl.load(Weight + tap * C + c[None, :], mask=in_c, other=0.0)
                        weight = weight.to(tl.float32)
                        new = ()
                        for s in tl.static_range(NH * NW):
                            if s // NW == r - j:
                                new = new + (acc[s] + xs[s % NW + k] * weight,)
                            else:
                                new = new + (acc[s],)
                        acc = new
    return acc
