"""Triton kernels of the gradients of `dwconv3d`.

A run of dy's elements meets the same elements whether dx or the gradient of the weight is made:

    dx[p] += weight[k] dy[p - k]        dweight[k] += x[p] dy[p - k]

So a program loads and converts each once for both. It holds runs of NW positions along W and walks
with them through all frames: what is at hand of dx and x are the KT frames that a frame of dy
meets, a ring that moves on by one. The sums of all taps stay in registers meanwhile, and while a
program walks through its share of the runs; shares are summed in a second stage, in one order.

A 5x5x5 kernel leaves no registers for dx, which then is the forward of dy, mirrored. A larger one
leaves none for its own sums: those of ROWS x KW taps are made at a time, in tiles of one frame.

Shapes: B clips, T frames, H rows, W columns, C channels; kernel KT x KH x KW.
"""

# mypy: disable-error-code="assignment"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from uniformer_kernels import _runtime
from uniformer_kernels._depthwise import (
    Config,
    Shape,
    Tuned,
    packed,
    place_of,
    readable,
    run_of,
    tile_of,
    tiling,
    tuned_for,
)

__all__ = ["bwd", "bwd_config", "bwd_weight", "in_one_pass", "tiles_config", "walks"]


# --- Kernels --------------------------------------------------------------------------


@triton.jit
def _frame(
    at, t, stride, mask, w0, W, STRIDE: tl.constexpr, NW: tl.constexpr, EVEN_W: tl.constexpr
):  # fmt: skip
    """The run of NW elements in frame t."""
    return run_of(at + t * stride, mask, w0, W, 0, NW, STRIDE, NW, EVEN_W)


@triton.jit
def _store_frame(
    run, to, t, stride, mask, w0, W, C: tl.constexpr, NW: tl.constexpr, EVEN_W: tl.constexpr
):  # fmt: skip
    """The first NW of `run` into frame t, if there is one."""
    to = to + t * stride
    for s in tl.static_range(NW):
        inside = mask & (t >= 0) & ((w0 + s < W) | EVEN_W)[:, None]
        tl.store(to + s * C, run[s].to(to.dtype.element_ty), mask=inside)


@triton.jit
def _through(run, dys, weight, FIRST: tl.constexpr, NW: tl.constexpr):
    """A run of dx, and what one tap adds to it."""
    new = ()
    for s in tl.static_range(NW):
        new = new + (run[s] + dys[FIRST + s] * weight,)
    return new


@triton.jit
def _dwconv3d_bwd_kernel(
    DY, X, Weight, DX, Partial,
    stride_dyb, stride_dyt, stride_dyh,
    stride_xb, stride_xt, stride_xh,
    T, H, W, tiles_w, tiles,
    C: tl.constexpr, STRIDE_DYW: tl.constexpr, STRIDE_XW: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, RESIDUAL: tl.constexpr,
    NW: tl.constexpr, EVEN_W: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Weight is (KT * KH * KW, C), Partial (splits, KT * KH * KW + 1, C), last the bias; DX may be
    None.

    A tile is a run of NW columns in a row, through all frames. Its neighbours are the rows next to
    it, with which it shares rows of dy in the first-level cache.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = (c < C)[None, :] | (C % BLOCK_C == 0)
    split = tl.program_id(1)

    # From frame to frame; in 64 bits, or a few frames could be too far away.
    per_dy, per_x = tl.full([], stride_dyt, tl.int64), tl.full([], stride_xt, tl.int64)
    per_dx = tl.full([], H, tl.int64) * W * C
    zero = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sums = (zero,) * (KT * KH * KW)  # in the order in which taps are met: rows, frames, columns
    db = zero
    for first in range(split * BLOCK_P, tiles, tl.num_programs(1) * BLOCK_P):
        tile = first + tl.arange(0, BLOCK_P)
        h = tile % H
        w0 = tile // H % tiles_w * NW
        b = (tile // H // tiles_w).to(tl.int64)
        inside = (tile < tiles)[:, None] & in_c
        of_dy = DY + (b * stride_dyb + w0 * STRIDE_DYW)[:, None] + c[None, :]
        of_x = X + (b * stride_xb + h.to(tl.int64) * stride_xh + w0 * STRIDE_XW)[:, None]
        of_x = of_x + c[None, :]
        if DX is not None:
            of_dx = DX + (b * T * per_dx + (h * W + w0) * C)[:, None] + c[None, :]

        # Frame t of dy meets frames t - KT // 2 to t + KT // 2 of x and dx.
        dx, x = (zero,) * (KT * NW), (zero,) * (KT * NW)
        for t in range(KT // 2):
            x = x[NW:] + _frame(of_x, t, per_x, inside & (t < T), w0, W, STRIDE_XW, NW, EVEN_W)
        for t in range(T):
            new = t + KT // 2
            x = x[NW:] + _frame(of_x, new, per_x, inside & (new < T), w0, W, STRIDE_XW, NW, EVEN_W)
            dx = dx[NW:] + (zero,) * NW
            met = ()
            for j in tl.static_range(KH):
                from_h = h + KH // 2 - j
                mask = inside & ((from_h >= 0) & (from_h < H))[:, None]
                at = of_dy + t * per_dy + (from_h.to(tl.int64) * stride_dyh)[:, None]
                dys = run_of(at, mask, w0, W, -(KW // 2), NW + KW // 2, STRIDE_DYW, NW, EVEN_W)
                if j == KH // 2:
                    for s in tl.static_range(NW):
                        db += dys[s + KW // 2]
                new_dx = ()
                for i in tl.static_range(KT):
                    run, xs = dx[i * NW : (i + 1) * NW], x[i * NW : (i + 1) * NW]
                    if RESIDUAL and (i == KT // 2) and (j == KH // 2):
                        run = _through(run, dys, 1.0, KW // 2, NW)
                    for k in tl.static_range(KW):
                        if DX is not None:
                            tap = (i * KH + j) * KW + k
                            weight = tl.load(Weight + tap * C + c[None, :], mask=in_c, other=0.0)
                            run = _through(run, dys, weight.to(tl.float32), KW - 1 - k, NW)
                        total = sums[(j * KT + i) * KW + k]
                        for s in tl.static_range(NW):
                            total += dys[KW - 1 - k + s] * xs[s]
                        met = met + (total,)
                    new_dx = new_dx + run
                dx = new_dx
            sums = met
            if DX is not None:
                _store_frame(dx, of_dx, t - KT // 2, per_dx, inside, w0, W, C, NW, EVEN_W)
        if DX is not None:
            for t in range(T, T + KT // 2):
                dx = dx[NW:] + (zero,) * NW
                _store_frame(dx, of_dx, t - KT // 2, per_dx, inside, w0, W, C, NW, EVEN_W)

    out = Partial + split.to(tl.int64) * (KT * KH * KW + 1) * C + c
    for n in tl.static_range(KT * KH * KW):
        tap = (n // KW % KT * KH + n // KW // KT) * KW + n % KW
        tl.store(out + tap * C, tl.sum(sums[n], axis=0), mask=c < C)
    tl.store(out + KT * KH * KW * C, tl.sum(db, axis=0), mask=c < C)


@triton.jit
def _dwconv3d_bwd_tiles_kernel(
    DY, X, Partial,
    stride_dyb, stride_dyt, stride_dyh,
    stride_xb, stride_xt, stride_xh,
    T, H, W, tiles_h, tiles_w, tiles,
    C: tl.constexpr, STRIDE_DYW: tl.constexpr, STRIDE_XW: tl.constexpr,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, ROWS: tl.constexpr,
    NH: tl.constexpr, NW: tl.constexpr, EVEN_W: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Partial is (splits, KT * KH * KW + 1, C), last the bias; a program does ROWS of KH rows.

    Programs that differ only in what they take of the kernel are neighbours: they share dy and x
    in the second-level cache.
    """
    GROUPS: tl.constexpr = (KH + ROWS - 1) // ROWS
    i = tl.program_id(0) % KT
    j0 = tl.program_id(0) // KT % GROUPS * ROWS
    c = tl.program_id(0) // KT // GROUPS * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = (c < C)[None, :] | (C % BLOCK_C == 0)
    split = tl.program_id(1)

    acc = (tl.zeros([BLOCK_P, BLOCK_C], tl.float32),) * (ROWS * KW)
    db = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(split * BLOCK_P, tiles, tl.num_programs(1) * BLOCK_P):
        tile = first + tl.arange(0, BLOCK_P)
        _, b, t, h0, w0 = place_of(tile, T, tiles_h, tiles_w, NH, NW)
        from_t = t + i - KT // 2
        in_t = (from_t >= 0) & (from_t < T) & (tile < tiles)

        at = (
            DY
            + (b * stride_dyb + t.to(tl.int64) * stride_dyt + h0.to(tl.int64) * stride_dyh)[:, None]
        )
        at = at + (w0 * STRIDE_DYW)[:, None] + c[None, :]  # (BLOCK_P, BLOCK_C)
        dys = ()
        for s in tl.static_range(NH * NW):
            h, w = h0 + s // NW, w0 + s % NW
            mask = ((tile < tiles) & (h < H) & ((w < W) | EVEN_W))[:, None] & in_c
            dy = tl.load(at + (s // NW * stride_dyh + s % NW * STRIDE_DYW), mask=mask, other=0.0)
            dy = dy.to(tl.float32)
            dys = dys + (dy,)
            db += dy

        frame = X + (b * stride_xb + from_t.to(tl.int64) * stride_xt + w0 * STRIDE_XW)[:, None]
        frame = frame + c[None, :]
        for r in tl.static_range(NH + ROWS - 1):
            from_h = h0 + j0 + r - KH // 2
            mask = (in_t & (from_h >= 0) & (from_h < H))[:, None] & in_c
            at = frame + (from_h.to(tl.int64) * stride_xh)[:, None]
            xs = run_of(at, mask, w0, W, -(KW // 2), NW + KW // 2, STRIDE_XW, NW, EVEN_W)
            for n in tl.static_range(NW + KW - 1):
                new = ()
                for s in tl.static_range(ROWS * KW):
                    # Of dy's NH x NW run, row r - j and column n - k meet tap (j, k).
                    if (
                        (r - s // KW >= 0)
                        and (r - s // KW < NH)
                        and (n - s % KW >= 0)
                        and (n - s % KW < NW)
                    ):
                        new = new + (acc[s] + dys[(r - s // KW) * NW + n - s % KW] * xs[n],)
                    else:
                        new = new + (acc[s],)
                acc = new

    out = Partial + split.to(tl.int64) * (KT * KH * KW + 1) * C + c
    for s in tl.static_range(ROWS * KW):
        j = j0 + s // KW
        tap = (i * KH + j) * KW + s % KW
        tl.store(out + tap * C, tl.sum(acc[s], axis=0), mask=(c < C) & (j < KH))
    tl.store(out + KT * KH * KW * C, tl.sum(db, axis=0), mask=(c < C) & (i == 0) & (j0 == 0))


# --- Launch ---------------------------------------------------------------------------

# A lane has 255 registers. Both gradients of a 3x3x3 kernel hold 78 numbers a channel: with 2
# channels a lane that takes 236 of them, and 1.40 instructions a product on sm_90, where dx and
# the weight's gradient one after the other take 1.62 and 2.37; and 3 activations are moved, not 4.
# The weight's gradient of 5x5x5 alone holds 171, one channel a lane: 1.38, where tiles take 1.67.
# Both gradients of that would hold 206: tried, it spills (1.28 instructions with 7 columns a run,
# 1.39 with 4), takes a minute to compile, and is bound by products, so that the bytes would not
# show.
TWO_CHANNELS, ONE_CHANNEL = 88, 178  # numbers that a lane holds for each, at most
BLOCK_C, LANES = 64, 256  # of 2 channels; of one, half as many
PROGRAMS_PER_SM = 2  # as many as there are registers for
ROWS, SUMS, TILES_PER_SM = 4, 25, 4  # of the kernel of tiles: of dy, and of the weight's gradient


def _held(kernel: Shape, W: int, frames: int) -> int:
    """Numbers a channel: the sums of taps, `frames` runs of dx and x, and what dy has to them."""
    NW = tile_of((1, 1, 1, W, 1), 1, None)[1]
    return math.prod(kernel) + frames * NW + NW + kernel[2] - 1


def in_one_pass(kernel: Shape, W: int) -> bool:
    """Whether `bwd` serves a kernel on rows of W elements."""
    return _held(kernel, W, 2 * kernel[0]) <= TWO_CHANNELS


def walks(kernel: Shape, W: int) -> bool:
    """Whether the weight's gradient alone has room for the sums of all taps."""
    return _held(kernel, W, kernel[0]) <= ONE_CHANNEL


def bwd_config(
    shape: Shape, stride_dyw: int, stride_xw: int, kernel: Shape, multiprocessors: int,
    tuned: Tuned | None = None, with_dx: bool = True,
) -> Config:  # fmt: skip
    """How the walk is launched on x (B, T, H, W, C); grid (blocks of channels, splits)."""
    B, T, H, W, C = shape
    KT, KH, KW = kernel
    two = _held(kernel, W, (1 + with_dx) * KT) <= TWO_CHANNELS
    lanes = LANES if two else LANES // 2
    width = min(BLOCK_C if two else BLOCK_C // 2, max(triton.next_power_of_2(C), 8))
    tuned = {"BLOCK_C": width, "BLOCK_P": lanes // width} | dict(tuned or {})
    _, NW, block_p, block_c, warps = tile_of(shape, 1, tuned)
    tiles_w = cdiv(W, NW)
    tiles, programs = B * H * tiles_w, cdiv(C, block_c)
    splits = max(min(multiprocessors * PROGRAMS_PER_SM // programs, cdiv(tiles, block_p)), 1)
    arguments = {
        "T": T, "H": H, "W": W, "C": C, "tiles_w": tiles_w, "tiles": tiles,
        "STRIDE_DYW": stride_dyw, "STRIDE_XW": stride_xw, "KT": KT, "KH": KH, "KW": KW,
        "NW": NW, "EVEN_W": W % NW == 0, "BLOCK_P": block_p, "BLOCK_C": block_c,
    }  # fmt: skip
    return Config((programs, splits), arguments, warps)


def tiles_config(
    shape: Shape, stride_dyw: int, stride_xw: int, kernel: Shape, multiprocessors: int,
    tuned: Tuned | None = None,
) -> Config:  # fmt: skip
    """How the kernel of tiles is launched on x (B, T, H, W, C); grid (programs, splits)."""
    KT, KH, KW = kernel
    arguments, warps = tiling(shape, kernel, ROWS, tuned)
    rows = min(KH, max(SUMS // KW, 1))
    programs = KT * cdiv(KH, rows) * cdiv(shape[4], arguments["BLOCK_C"])
    groups = cdiv(arguments["tiles"], arguments["BLOCK_P"])
    splits = max(min(multiprocessors * TILES_PER_SM // programs, groups), 1)
    arguments |= {"STRIDE_DYW": stride_dyw, "STRIDE_XW": stride_xw, "ROWS": rows}
    return Config((programs, splits), arguments, warps)


def bwd(
    dy: Tensor, x: Tensor, weight: Tensor, residual: bool, tuned: Tuned | None = None
) -> tuple[Tensor, Tensor]:
    """dx, and the gradients of the weight and last of the bias, (taps + 1, C) fp32, in one pass.

    dy and x (B, T, H, W, C), not empty. `tuned` as in `fwd`.
    """
    dy, dx = readable(dy), dy.new_empty(dy.shape)
    tuned = tuned_for("bwd", x, weight.shape[2:]) if tuned is None else tuned
    return dx, _walk(dy, x, weight, dx, residual, tuned)


def bwd_weight(dy: Tensor, x: Tensor, weight: Tensor, tuned: Tuned | None = None) -> Tensor:
    """The latter of `bwd`'s results alone. What is `tuned` with NH goes in tiles."""
    dy, x, kernel = readable(dy), readable(x), weight.shape[2:]
    tuned = tuned_for("bwd_weight", x, kernel) if tuned is None else tuned
    if walks(kernel, x.shape[3]) and "NH" not in (tuned or {}):
        return _walk(dy, x, weight, None, False, tuned)
    grid, arguments, warps = tiles_config(
        x.shape, dy.stride(3), x.stride(3), kernel, _runtime.multiprocessors(x), tuned
    )
    partial = _partial(x, grid[1], weight)
    with _runtime.on_device(x):
        _dwconv3d_bwd_tiles_kernel[grid](
            dy, x, partial, *dy.stride()[:3], *x.stride()[:3], **arguments, num_warps=warps
        )
    return partial.sum(0)


def _walk(
    dy: Tensor, x: Tensor, weight: Tensor, dx: Tensor | None, residual: bool, tuned: Tuned | None
) -> Tensor:
    x = readable(x)
    grid, arguments, warps = bwd_config(
        x.shape, dy.stride(3), x.stride(3), weight.shape[2:], _runtime.multiprocessors(x), tuned,
        with_dx=dx is not None,
    )  # fmt: skip
    partial = _partial(x, grid[1], weight)
    with _runtime.on_device(x):
        _dwconv3d_bwd_kernel[grid](
            dy, x, None if dx is None else packed(weight), dx, partial,
            *dy.stride()[:3], *x.stride()[:3], **arguments, RESIDUAL=residual, num_warps=warps,
        )  # fmt: skip
    return partial.sum(0)


def _partial(x: Tensor, splits: int, weight: Tensor) -> Tensor:
    return x.new_empty(splits, weight[0].numel() + 1, len(weight), dtype=torch.float32)
