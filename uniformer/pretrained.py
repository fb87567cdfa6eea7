"""The released video checkpoints: what each was trained on, how it is tested, where it lies.

Figures are those of the official model zoo, https://github.com/Sense-X/UniFormer; GFLOPs there
means multiply-adds, summed over the views of a test.
"""

import fnmatch
import hashlib
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from uniformer.checkpoint import CheckpointError
from uniformer.configs import PRESETS, InputConfig

__all__ = ["Weights", "fetch", "find_weights", "kinetics400_classes", "list_pretrained"]

log = logging.getLogger(__name__)

HUB = "Sense-X/uniformer_video"
HUB_AUTHOR = "Andy1621/uniformer"
NUM_CLASSES = {"k400": 400, "k600": 600, "sthv1": 174, "sthv2": 174, "ucf101": 101, "hmdb51": 51}


@dataclass(frozen=True)
class Weights:
    """One released checkpoint.

    Attributes:
        model: the preset it fits.
        tag: its name among the preset's.
        frames: T it was trained with.
        stride: between frames; None for uniform sampling over the whole video.
        crops: spatial crops of the published test.
        clips: temporal clips of the published test.
        top1: accuracy of that test, in percent.
        gflops: multiply-adds of that test over all views, in 10^9, as published.
        drive: Google Drive id of the file; None if it was never released.
        hub: Hugging Face repository that has it.
        sha256: of the file, where known.
        size: H and W of a view.
    """

    model: str
    tag: str
    frames: int
    stride: int | None
    crops: int
    clips: int
    top1: float
    gflops: float
    drive: str | None
    hub: str | None = None
    sha256: str | None = None
    size: int = 224

    @property
    def name(self) -> str:
        return f"{self.model}.{self.tag}"

    @property
    def file(self) -> str:
        return f"{self.model}_{self.tag}.pth"

    @property
    def dataset(self) -> str:
        return self.tag.split("_")[0]

    @property
    def num_classes(self) -> int:
        return NUM_CLASSES[self.dataset]

    @property
    def head_dim(self) -> int:
        """Stored here because files of equal shapes exist for other head widths."""
        return {"uniformer_xxs": 28, "uniformer_xs": 32}.get(self.model, 64)

    @property
    def input(self) -> InputConfig:
        """Clips as the official code feeds them: HMDB51 and Something-Something in BGR order."""
        return InputConfig(
            frames=self.frames,
            stride=self.stride or 1,
            sampling="dense" if self.stride else "uniform",
            size=self.size,
            bgr=self.dataset in ("sthv1", "sthv2", "hmdb51"),
        )

    @property
    def classes(self) -> list[str] | None:
        """Names in the order of the logits, where this library knows them."""
        return kinetics400_classes() if self.dataset == "k400" else None


@cache
def kinetics400_classes() -> list[str]:
    """Kinetics-400 in the order of the official weights, which is not the alphabetical one."""
    return (Path(__file__).parent / "labels/kinetics400.txt").read_text().splitlines()


_S, _B = "uniformer_small", "uniformer_base"
_XXS, _XS = "uniformer_xxs", "uniformer_xs"
# fmt: off
_TABLE = [
    # model, tag, frames, stride, crops, clips, top-1, GFLOPs, Drive id
    Weights(_S, "k400_8x8", 8, 8, 1, 4, 78.4, 70, "1-kitVTkWErHXI_x-sLItvK9-sOmb53j6"),
    Weights(_S, "k400_16x4", 16, 4, 1, 4, 80.8, 167, "1-jGZIIuTM5IYIpqkNTojhGhfMc7Gu9Kt",
            sha256="4829a6abe934a1c8083f377afea621f01d16bc4a93ce6ae74d7c5bea7eff6a7b"),
    Weights(_S, "k400_16x8", 16, 8, 1, 4, 80.8, 167, "174muWZJcZHieABDZMKiJ0tNeFLoEkJLx", HUB),
    Weights(_S, "k400_32x4", 32, 4, 1, 4, 82.0, 438, None),
    Weights(_B, "k400_8x8", 8, 8, 1, 4, 79.8, 161, "1hBxGU-QE8hGRBjSNCymJ7Au06LhluvTv"),
    Weights(_B, "k400_16x4", 16, 4, 1, 4, 82.0, 387, "15ipzFaZdTt-aHv7jcr_h_vgYD2X7D6AD",
            HUB_AUTHOR),
    Weights(_B, "k400_16x8", 16, 8, 1, 4, 81.7, 387, "1VoZcpFZbk9lEyRQ7gqRgT4CsnVt9g7uk"),
    Weights(_B, "k400_32x4", 32, 4, 1, 4, 82.9, 1036, "1gHxx8cr1H0CNvngj1kB9ArgcPfJtqjCV", HUB,
            "b432450566cdc4f50222e4851b5d304bba4444a699cdbb43fa529ceb18ae1f8e"),
    Weights(_S, "k600_16x4", 16, 4, 1, 4, 82.8, 167, "1-dqzjm5RZVspWHQLRD4S1vo4_6jyVltb"),
    Weights(_S, "k600_16x8", 16, 8, 1, 4, 82.7, 167, "1-c835NJjg_015WxLBQF-1cPdQsyWMWfY", HUB),
    Weights(_B, "k600_16x4", 16, 4, 1, 4, 84.0, 387, "1nBQCBCsCflhZ4OGUoGB3pAkc_GDau7vd"),
    Weights(_B, "k600_16x8", 16, 8, 1, 4, 83.4, 387, "1aidHdSd-h65-_EUkfNOdMMw0ZB8G5maY"),
    Weights(_B, "k600_32x4", 32, 4, 1, 4, 84.5, 1036, "1-DwdVf8w8lYj-iFpU40pfEpog9VE5PQB", HUB),
    Weights(_S, "sthv1_16_prek400", 16, None, 3, 1, 57.2, 125, "1-bdFsmXt2Ztf43lrVgmqS8_VYJ8tub6J"),
    Weights(_S, "sthv1_16_prek600", 16, None, 3, 1, 57.6, 125, "1-YbYGjM15MDtQnrmCeZ9H2ybNdYTFkgO",
            HUB),
    Weights(_S, "sthv1_32_prek400", 32, None, 3, 1, 58.8, 329, "1-Y5ADssqM2C8o_1jix48fQM788mVGWQ3"),
    Weights(_S, "sthv1_32_prek600", 32, None, 3, 1, 59.9, 329, "1-XEgaGqXGp1EGzFl63ctApnvU54X27WP"),
    Weights(_B, "sthv1_16_prek400", 16, None, 3, 1, 59.1, 290, "1uMq4W5lf17vOHUmccNjYLeTMqaWHSh6v"),
    Weights(_B, "sthv1_16_prek600", 16, None, 3, 1, 58.8, 290, "1xpiL8zEDWYHFR55gOsbQiI41YEjTD89J"),
    Weights(_B, "sthv1_32_prek400", 32, None, 3, 1, 60.9, 777, "18A3FuUUbdQ8ehMQ0D78qTTtm6YmIVWaO"),
    Weights(_B, "sthv1_32_prek600", 32, None, 3, 1, 61.0, 777, "1xE1aJYAYFOlXOkpiIbJFHu_jSrr8reKm",
            HUB),
    Weights(_S, "sthv2_16_prek400", 16, None, 3, 1, 67.7, 125, "1-Wq22024HB7tT8kPX6eSMn2GUNMI-_gY",
            sha256="4f5df1bf569e7e0ead9ae9ea43ecef5a852ef14dcf67575e36aa3ce8edd0ed9f"),
    Weights(_S, "sthv2_16_prek600", 16, None, 3, 1, 69.4, 125, "1-V1mQp4fIIYhaXUWCgZXkJ0H6ne0Z8rz",
            HUB),
    Weights(_S, "sthv2_32_prek400", 32, None, 3, 1, 69.0, 329, "1-5Q5S-NRmHFkIBygaRYpJLT7aI9cpmky"),
    Weights(_S, "sthv2_32_prek600", 32, None, 3, 1, 70.4, 329, "1-1K5R3Ed4t8d_DZnJ62xysIt1dBNmx96"),
    Weights(_B, "sthv2_16_prek400", 16, None, 3, 1, 70.4, 290, "1s78JBpnykyJ7pYEGRDK8BZL9seIRIUlC",
            sha256="b3091fbfd2b47845988831599a0325c426b6ec84aee6a545c152fafe84adeffe"),
    Weights(_B, "sthv2_16_prek600", 16, None, 3, 1, 70.2, 290, "16nCBGWzMM8n8Vr_EY0UmvgzLG0S_QYef"),
    Weights(_B, "sthv2_32_prek400", 32, None, 3, 1, 71.1, 777, "1-rpMARXnyvyj6YUJkIvVqtna86egpjoS"),
    Weights(_B, "sthv2_32_prek600", 32, None, 3, 1, 71.2, 777, "1-lkRB3546l_ECuObN_IrHws1C9a-qKPr",
            HUB),
    Weights(_S, "ucf101_16x4_prek400", 16, 4, 3, 5, 98.3, 625, "1Ey8JIGcP8G2H0bKxyNnD61lvHV1eerVt"),
    Weights(_S, "hmdb51_16x4_prek400", 16, 4, 3, 5, 77.5, 625, "1Es4xtcEvQSomnbp6Eo7TC3JejIwHf5yS"),
    # Light models, which prune tokens: listed with the zoo, not built by this version.
    Weights(_XXS, "k400_4_128", 4, None, 1, 1, 63.2, 1.0, "1EFBxDS2m4mpk_sYejnPuGSDRH_1ELDhx",
            size=128),
    Weights(_XXS, "k400_4_160", 4, None, 1, 1, 65.8, 1.6, "1DtTFT7FZ_kUjxqXAYyWhfXSr_EIHQi8a",
            size=160),
    Weights(_XXS, "k400_8_128", 8, None, 1, 1, 68.3, 2.0, "1E9VwV-XJQCmo9nBhxLxa9DdphZiIg38z",
            size=128),
    Weights(_XXS, "k400_8_160", 8, None, 1, 1, 71.4, 3.3, "1Dxq82X8mBsfVOzij0HSeb1g4sdez71FM",
            size=160),
    Weights(_XXS, "k400_16_128", 16, None, 1, 1, 73.3, 4.2, "1DngSOmw0rStnYZlaCnz1xII6CU2d2R_j",
            size=128),
    Weights(_XXS, "k400_16_160", 16, None, 1, 1, 75.1, 6.9, "1DxqrNHb4h1ZKnEFaqbkKJAXQsyIFeD7b",
            size=160),
    Weights(_XXS, "k400_32_160", 32, None, 1, 1, 77.9, 15.4, "1EIVXRYn5UIkLaJGDpTBxTcyog_dKbcZe",
            size=160),
    Weights(_XS, "k400_32_192", 32, None, 1, 1, 78.6, 34.2, "1DtdX-keSB-RkH23KqtQH36IMOUmol1kw",
            size=192),
]
# fmt: on
ZOO = {w.name: w for w in _TABLE}


def list_pretrained(pattern: str = "*") -> list[str]:
    """Names of the released checkpoints, as in "uniformer_small.k400_16x4".

    Args:
        pattern: shell wildcards; "*k400*" for those of Kinetics-400.
    """
    return fnmatch.filter(ZOO, pattern)


def find_weights(model: str, tag: str) -> Weights:
    """The released checkpoint of a preset.

    Args:
        model: the preset.
        tag: with or without the preset's name before it.

    Raises:
        ValueError: there is none of that name, or this version cannot build its model.
    """
    name = tag if "." in tag else f"{model}.{tag}"
    weights = ZOO.get(name)
    if weights is None:
        known = [w.tag for w in ZOO.values() if w.model == model]
        raise ValueError(
            f"no file and no released checkpoint is named {tag!r}; {model} has "
            f"{', '.join(known) or 'none'}"
        )
    if weights.model not in PRESETS:
        raise ValueError(
            f"{name} belongs to the light models, which prune tokens; this version of uniformer "
            f"does not build them"
        )
    if weights.model != model:
        raise ValueError(f"{name} holds weights of {weights.model}, not of {model}")
    return weights


def fetch(weights: Weights) -> Path:
    """The file of a released checkpoint: as put there by hand, or through the Hugging Face hub.

    Args:
        weights: which.

    Returns:
        Where it lies on this machine.

    Raises:
        CheckpointError: it is not here and cannot be fetched, with the file to put where; or its
            sha256 is not the known one.
    """
    local = Path(torch.hub.get_dir()) / "checkpoints" / weights.file
    path = local if local.is_file() else _from_hub(weights, local)
    if weights.sha256 is None:
        log.info("%s: no sha256 is known for %s, it is used unchecked", path, weights.name)
    else:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != weights.sha256:
            raise CheckpointError(
                f"{path} is not the released {weights.name}: its sha256 must be {weights.sha256}, "
                f"is {found}. Fetch it again, or pass the path itself as pretrained= to use it "
                f"unchecked"
            )
    return path


def _from_hub(weights: Weights, local: Path) -> Path:
    if weights.drive is None:
        raise CheckpointError(f"{weights.name}: the authors published its log but no weights")
    by_hand = (
        f"download https://drive.google.com/file/d/{weights.drive} in a browser and put it at "
        f"{local}"
    )
    if weights.hub is None:
        raise CheckpointError(f"{weights.name} lies on Google Drive only: {by_hand}")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise CheckpointError(
            f"{weights.name} is on the Hugging Face hub: pip install 'uniformer[hub]' to fetch it "
            f"from there, or {by_hand}"
        ) from error
    try:
        return Path(hf_hub_download(weights.hub, weights.file))
    except Exception as error:  # the hub's own, the network's and the file system's
        raise CheckpointError(
            f"{weights.name} could not be fetched from the hub's {weights.hub} "
            f"({type(error).__name__}: {error}). Without network: {by_hand}"
        ) from error
