"""A few launches of every kernel on odd shapes, for compute-sanitizer to watch.

compute-sanitizer --tool memcheck python -m benchmarks.sanitized
"""

from typing import Any

import torch

from uniformer_kernels import (
    Norm,
    attention,
    backend,
    dwconv3d,
    dwconv3d_stats,
    ffn,
    patch_embed,
    pointwise_stats,
)

# Borders of every tile: sizes of one, past a tile, and none of them a multiple.
SHAPES = ((1, 2, 5, 9, 72), (2, 3, 8, 14, 64), (1, 1, 1, 1, 8))


def main() -> None:
    """Forward and backward, each backend, fp32 and bf16; waits for the device after each."""
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    names = ("triton", "cuda") if cuda else ("triton", "native")
    launched = 0
    for name in names:
        with backend(name):
            for dtype in (torch.float32, torch.bfloat16):
                for shape in SHAPES if cuda else SHAPES[2:]:
                    for k in (3, 5):
                        x = torch.randn(shape, device=device).to(dtype).requires_grad_()
                        weight = torch.randn(shape[-1], 1, k, k, k, device=device).to(dtype)
                        bias = torch.randn(shape[-1], device=device).to(dtype)
                        y = dwconv3d(
                            x, weight.requires_grad_(), bias.requires_grad_(), residual=k == 3
                        )
                        y.float().square().sum().backward()
                        launched += 1
                        if cuda:
                            torch.cuda.synchronize()
    with backend("triton"):
        for C, F in ((24, 72), (128, 512), (8, 16)):
            _block(torch.randn(2, 3, 5, 7, C, device=device), F, torch.float16)
            launched += 1
        for shape in ((1, 2, 5, 9, 72), (2, 3, 2, 14, 64), (1, 1, 1, 1, 8)):
            _dpe_norm(torch.randn(shape, device=device))
            launched += 1
        for N, h, d in ((1, 1, 8), (130, 2, 28), (70, 1, 64)):
            qkv = torch.randn(2, N, 3 * h * d, device=device, dtype=torch.float16)
            attention(qkv.requires_grad_(), h).float().square().sum().backward()
            launched += 1
        for shape, N in (((2, 5, 9, 11, 3), 16), ((1, 2, 5, 6, 24), 320)):
            _embed(torch.randn(shape, device=device), N, torch.float16)
            launched += 1
    if cuda:
        torch.cuda.synchronize()
    print(f"{launched} shapes, dtypes and kernels went through forward and backward")


def _block(x: torch.Tensor, F: int, dtype: torch.dtype) -> None:
    """The local block's other operators, with all that they do around their products."""
    C = x.shape[-1]
    like: dict[str, Any] = {"device": x.device, "requires_grad": True}
    w, w1, w2 = (torch.randn(*shape, **like) for shape in ((C, C), (F, C), (C, F)))
    b, b1, b2, gamma = (torch.randn(n, **like) for n in (C, F, C, C))
    scale = torch.tensor([0.0, 2.0], device=x.device)
    with torch.autocast(x.device.type, dtype):
        x, stats = dwconv3d_stats(x, torch.randn(C, 1, 3, 3, 3, **like), residual=True)
        norm = Norm(stats, gamma, b)
        x, stats = pointwise_stats(x, w, b, norm=norm, scale=scale, residual=x)
        x = ffn(x, w1, b1, w2, b2, norm=Norm(stats, gamma, b), scale=scale, residual=True)
    x.float().square().sum().backward()


def _dpe_norm(x: torch.Tensor) -> None:
    """In one kernel, however few its programs; its gradient runs kernels that are seen above."""
    from uniformer_kernels import dwconv3d_norm_triton

    C = x.shape[-1]
    weight = torch.randn(C, 1, 3, 3, 3, device=x.device)
    bias, gamma, beta = torch.randn(3, C, device=x.device)
    dwconv3d_norm_triton.fwd(x, weight, bias, True, gamma, beta, 1e-6, torch.float16)


def _embed(x: torch.Tensor, N: int, dtype: torch.dtype) -> None:
    """The stem on three channels, in NCTHW memory; else the downsampling."""
    C = x.shape[-1]
    stem = C == 3
    kernel, stride = ((3, 4, 4), (2, 4, 4)) if stem else ((1, 2, 2), (1, 2, 2))
    weight = torch.randn(N, C, *kernel, device=x.device, requires_grad=True)
    x = x.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1) if stem else x
    with torch.autocast(x.device.type, dtype):
        y = patch_embed(
            x, weight, None, None, None, stride=stride, padding=(1, 0, 0) if stem else (0, 0, 0)
        )
    y.float().square().sum().backward()


if __name__ == "__main__":
    main()
