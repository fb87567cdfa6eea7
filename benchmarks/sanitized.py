"""A few launches of every kernel on odd shapes, for compute-sanitizer to watch.

compute-sanitizer --tool memcheck python -m benchmarks.sanitized
"""

import torch

from uniformer_kernels import backend, dwconv3d

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
    print(f"{launched} shapes, dtypes and kernels went through forward and backward")


if __name__ == "__main__":
    main()
