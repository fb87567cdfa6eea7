"""The whole of it in one command: build clips, train, test, look, predict."""

import json
import platform
import random
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from uniformer.configs import InputConfig
from uniformer.data import worker_count
from uniformer.decoder import Decoder
from uniformer.digits import CLASSES, build_digits
from uniformer.evaluate import Evaluation, TestConfig, test
from uniformer.factory import load_model
from uniformer.predict import PredictConfig, contact_sheet, predict, predict_video
from uniformer.train import TrainConfig, train
from uniformer.transforms import AugmentConfig

__all__ = ["DemoConfig", "demo"]


@dataclass
class DemoConfig:
    """Settings of `uniformer demo`.

    Attributes:
        out: folder for clips, checkpoints and pictures.
        epochs: passes over the clips.
        share: of the clips to build and train on.
        seed: of everything random.

    Raises:
        ValueError: a value is out of its range.
    """

    out: str = "runs/demo"
    epochs: int = 6
    share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or not 0 < self.share <= 1:
            raise ValueError(
                f"epochs must be 1 or more and share above 0 and at most 1, got {self.epochs} "
                f"and {self.share}"
            )


def demo(cfg: DemoConfig) -> None:
    """Teach a small UniFormer to tell motions of handwritten digits apart."""
    started = time.perf_counter()
    out = Path(cfg.out)
    print(f"1. Clips: handwritten digits in motion, as mp4 files, in {out / 'clips'}")
    clips = build_digits(out / "clips", cfg.seed, cfg.share)

    run = out / "run"
    _start_over(cfg, out / "demo.json", run)
    print("2. Training uniformer_nano on them, from nothing")
    best = train(
        TrainConfig(
            data=str(clips),
            out=str(run),
            model="uniformer_nano",
            input=InputConfig(frames=8, stride=2, size=48),
            # No mirroring: it would turn left into right.
            augment=AugmentConfig(scale=(0.6, 1.0), flip=0.0),
            epochs=cfg.epochs,
            batch_size=16,
            lr=1e-3,
            seed=cfg.seed,
        )
    )

    print("3. Testing on digits it has never seen, 2 clips x 3 crops of each video")
    settings = TestConfig(str(best), str(clips), clips=2, crops=3, out=str(out / "test.json"))
    result = test(settings)
    settings = TestConfig(
        str(best), str(clips), clips=2, crops=3, shuffle_frames=True, out=str(out / "shuffled.json")
    )
    shuffled = test(settings)

    print("4. Pictures, and one video from disk")
    _curves(run / "metrics.json", out / "curves.png")
    rng = random.Random(cfg.seed)
    videos = [rng.choice(sorted((clips / "val" / c).iterdir())) for c in CLASSES]
    model = load_model(best)
    with Decoder() as decoder:
        seen = [predict_video(model, v, decoder=decoder) for v in videos]
    contact_sheet(seen, out / "contact_sheet.png", model.input, list(CLASSES))
    predict(PredictConfig([str(videos[0])], str(best), top=3))

    seconds = round(time.perf_counter() - started)
    _write_result(out / "result.json", cfg, result, shuffled, seconds)
    print(
        f"""
  top-1 on unseen digits               {result.top1:6.1f}%   ({result.videos} videos)
  the same, frames in random order     {shuffled.top1:6.1f}%   (chance: {100 / len(CLASSES):.1f}%)

  curves         {out / "curves.png"}
  contact sheet  {out / "contact_sheet.png"}
  weights        {best}
  took           {seconds} s

Your own videos, one folder a class:
  uniformer train --data FOLDER --out runs/mine
"""
    )


def _start_over(cfg: DemoConfig, mark: Path, run: Path) -> None:
    """Drop a training that is finished or had other settings; a killed one goes on."""
    settings, metrics = json.dumps(asdict(cfg)), run / "metrics.json"
    finished = metrics.is_file() and len(json.loads(metrics.read_text())) >= cfg.epochs
    if finished or not mark.is_file() or mark.read_text() != settings:
        shutil.rmtree(run, ignore_errors=True)
    mark.write_text(settings)


def _write_result(
    path: Path, cfg: DemoConfig, result: Evaluation, shuffled: Evaluation, seconds: int
) -> None:
    """The figures, and what they were taken on."""
    content = {
        "settings": asdict(cfg),
        "videos": result.videos,
        "top1": result.top1,
        "top1_frames_in_random_order": shuffled.top1,
        "seconds": seconds,
        "environment": {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "machine": platform.machine(),
            "cores": worker_count(None),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def _curves(metrics: Path, path: Path) -> None:
    """Loss and accuracy by epoch."""
    import matplotlib.pyplot as plt

    history = json.loads(metrics.read_text())
    epochs = [row["epoch"] for row in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.plot(epochs, [row["train_loss"] for row in history], "o-", color="#0072B2")
    left.set(xlabel="epoch", ylabel="training loss (cross-entropy)", ylim=(0, None))
    for key, label, colour, marker in (
        ("train_top1", "training clips", "#0072B2", "o"),
        ("val_top1", "unseen digits", "#D55E00", "s"),
    ):
        right.plot(epochs, [row[key] for row in history], f"{marker}-", color=colour, label=label)
    right.axhline(100 / len(CLASSES), color="0.5", linestyle=":", label="chance")
    right.set(xlabel="epoch", ylabel="top-1 accuracy (%)", ylim=(0, 102))
    right.legend(loc="center right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
