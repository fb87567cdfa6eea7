"""Real handwriting in motion: a small data set of mp4 files that only time tells apart.

Scikit-learn's 1,797 scans of handwritten digits move left, right, up or down, turn clockwise or
counterclockwise, grow or shrink; which digit it is does not matter. The eight classes are four
pairs, each the other played backwards, so that the frames of a clip in random order say nothing
about which of the two it is. Digits of the training clips never occur in validation clips.
"""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

__all__ = ["CLASSES", "build_digits"]

CLASSES = (
    "move left", "move right", "move up", "move down",
    "turn clockwise", "turn counterclockwise", "grow", "shrink",
)  # fmt: skip
HEIGHT, WIDTH, FRAMES, FPS = 48, 64, 20, 10
SPLITS = {"train": (160, slice(0, 1400)), "val": (30, slice(1400, None))}  # clips a class, digits
ENCODING = {"crf": "23", "preset": "veryfast"}
VERSION = 1  # of what is drawn; raised when that changes


def build_digits(folder: str | Path, seed: int = 0, share: float = 1.0) -> Path:
    """Write the clips, unless they are there already.

    Args:
        folder: gets train/ and val/, with a folder of mp4 files for each class.
        seed: of everything random.
        share: of the clips a class, to build fewer.

    Returns:
        The folder.
    """
    folder = Path(folder)
    settings = {"version": VERSION, "seed": seed, "share": share}
    done = folder / "settings.json"
    if done.is_file() and json.loads(done.read_text()) == settings:
        return folder
    from sklearn.datasets import load_digits

    shutil.rmtree(folder, ignore_errors=True)
    images = load_digits().images / 16.0  # (1797, 8, 8), 0..1
    images = images[np.random.default_rng(seed).permutation(len(images))]
    jobs = [
        (folder / split / name / f"{i:04}.mp4", name, images[digits], (seed, s, c, i))
        for s, (split, (count, digits)) in enumerate(SPLITS.items())
        for c, name in enumerate(CLASSES)
        for i in range(max(int(count * share), 1))
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # encoding does not hold Python's lock
        written = pool.map(_write, jobs)
        list(tqdm(written, "clips", len(jobs), unit="clip", leave=False, disable=None))
    done.write_text(json.dumps(settings))
    return folder


def _write(job: tuple[Path, str, np.ndarray, tuple[int, ...]]) -> None:
    path, name, digits, seed = job
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    _encode(_clip(digits[rng.integers(len(digits))], name, rng), path)


def _clip(digit: np.ndarray, name: str, rng: np.random.Generator) -> np.ndarray:
    """One digit (8, 8) in motion -> (FRAMES, HEIGHT, WIDTH, 3), uint8."""
    from scipy.ndimage import affine_transform

    time = np.linspace(-0.5, 0.5, FRAMES)
    size = np.full(FRAMES, rng.uniform(16, 24))  # pixels
    angle = np.full(FRAMES, rng.uniform(-0.5, 0.5))  # radians
    centre = np.array([HEIGHT, WIDTH]) / 2 + rng.uniform(-4, 4, 2)
    centre = np.tile(centre, (FRAMES, 1))
    step = rng.uniform(18, 26) * time  # pixels over the whole clip
    turn = rng.uniform(1.5, 3.0) * time
    growth = np.exp(rng.uniform(0.7, 1.1) * time)
    if name.startswith("move"):
        axis = 1 if name in ("move left", "move right") else 0
        centre[:, axis] += step if name in ("move right", "move down") else -step
    elif name.startswith("turn"):
        angle += turn if name == "turn clockwise" else -turn
    else:
        size = size * (growth if name == "grow" else 1 / growth)

    ink, paper = rng.uniform(0.6, 1.0, 3), rng.uniform(0.0, 0.3, 3)
    grain = rng.normal(0, 0.015, (FRAMES, HEIGHT, WIDTH, 1))
    masks = []
    for s, a, c in zip(size, angle, centre, strict=True):
        back = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) * (8 / s)
        masks.append(affine_transform(digit, back, 3.5 - back @ c, (HEIGHT, WIDTH), order=1))
    mask = np.stack(masks)[..., None]
    frames = paper + mask * (ink - paper) + grain
    return (frames.clip(0, 1) * 255).round().astype(np.uint8)


def _encode(frames: np.ndarray, path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=ENCODING)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
