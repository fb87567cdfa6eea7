"""Imports point one way: cli -> train, evaluate -> data, checkpoint, model -> layers -> kernels."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FIRST_PARTY = {"uniformer", "uniformer_kernels", "benchmarks", "tests"}

# From the bottom up: a file may import from the floors below its own, and from its own.
FLOORS = [
    ["configs", "video", "run_folder", "optim"],
    [
        "layers",
        "depthwise",
        "doctor",
        "sampling",
        "lists",
        "decoder",
        "transforms",
        "flops",
        "digits",
    ],
    ["global_block", "local_block"],
    ["model", "data", "official_blocks"],
    ["kernelized"],
    ["checkpoint", "scan"],
    ["pretrained"],
    ["factory"],
    ["recipe"],
    ["evaluate", "train", "predict", "info"],
    ["demo"],
    ["cli"],
]
FLOOR = {f"uniformer.{name}": i for i, floor in enumerate(FLOORS) for name in floor}
OPS = {
    "layers",
    "global_block",
    "local_block",
    "depthwise",
    "kernelized",
    "doctor",
}  # the only files of the package that know the operators


def modules(folder: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).glob("*.py") if not p.name.startswith("__"))


def imports(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    return {name for name in names if name.split(".")[0] in FIRST_PARTY}


@pytest.mark.parametrize("file", modules("uniformer"), ids=lambda p: p.stem)
def test_the_package_imports_downwards(file):
    own = FLOOR[f"uniformer.{file.stem}"]
    for name in imports(file):
        if name.split(".")[0] == "uniformer_kernels":
            assert file.stem in OPS, f"{file.name} knows the operators; layers.py does"
        else:
            assert FLOOR[name] <= own, f"{file.name} imports {name} from above"


@pytest.mark.parametrize("file", modules("kernels/uniformer_kernels"), ids=lambda p: p.stem)
def test_operators_do_not_import_one_another(file):
    """But for what they add to, as dwconv3d_norm to dwconv3d; and what several share, which is in
    files whose names begin with an underscore."""
    own = {f"uniformer_kernels.{file.stem}_{kind}" for kind in ("triton", "native")}
    own.add(f"uniformer_kernels.{file.stem.rpartition('_')[0]}")
    others = imports(file) - own - {"uniformer_kernels"}
    assert all(name.startswith("uniformer_kernels._") for name in others), others


@pytest.mark.parametrize("file", sorted((ROOT / "uniformer").glob("*.py")), ids=lambda p: p.stem)
def test_only_the_runtime_reads_the_environment(file):
    assert "os.environ" not in file.read_text()
    assert "getenv" not in file.read_text()


def test_the_package_opens_without_torch():
    """Processes that decode video import uniformer.video, and must stay small."""
    import subprocess
    import sys

    program = f"import sys; sys.path = {sys.path!r}; import uniformer.decoder"
    program += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
