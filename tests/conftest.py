import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the first kernel module is imported


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


GPU = torch.cuda.is_available()
BACKENDS = ["reference", "triton", "cuda"] if GPU else ["reference", "native", "triton"]


@pytest.fixture(params=BACKENDS)
def chosen(request) -> Iterator[str]:
    """Each backend of dwconv3d that runs here."""
    from uniformer_kernels import backend

    with backend(request.param):
        yield request.param


@pytest.fixture(params=BACKENDS[:2])
def fast(request) -> Iterator[str]:
    """Those of them that are: the interpreter takes seconds."""
    from uniformer_kernels import backend

    with backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fixed seed, and every `torch.empty` starts as NaN: an operator must write all it returns."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """Moving digits, a few of each class: train/ and val/ with a folder of mp4 files a class."""
    from uniformer.digits import build_digits  # needs what decodes and encodes videos

    return build_digits(tmp_path_factory.mktemp("digits"), share=0.04)
