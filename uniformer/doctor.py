"""What runs here, on what, and why."""

import platform
from dataclasses import dataclass

import torch

from uniformer_kernels import report

__all__ = ["DoctorConfig", "doctor"]


@dataclass
class DoctorConfig:
    """Settings of `uniformer doctor`: there are none."""


def doctor(cfg: DoctorConfig) -> None:
    """Say which implementation serves which operator here, and why not the others."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} CPU threads, GPU: {gpu}"
    )
    print(f"{'operator':<12}{'device':<8}served by")
    for op, device, served_by, others in report():
        print(f"{op:<12}{device:<8}{served_by}")
        for name, why in others.items():
            if name != served_by:
                print(f"{'':<20}not {name}: {why or 'it runs when asked for'}")
    print("UNIFORMER_BACKEND, or uniformer_kernels.backend(...), asks for another")
