"""What a video shows: the top classes of a model, and a picture of what the model saw."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from uniformer.configs import InputConfig
from uniformer.data import TestClips
from uniformer.decoder import Decoder
from uniformer.factory import open_model
from uniformer.lists import Sample, read_labels, videos_in
from uniformer.model import UniFormer
from uniformer.video import VideoDecodeError

__all__ = ["PredictConfig", "Prediction", "contact_sheet", "predict", "predict_video"]


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of a video.

    Attributes:
        path: the video.
        classes: their names, or "class 17" where names are not known; likeliest first.
        probabilities: softmax of the logits averaged over views.
        views: (V, 3, T, H, W), what the model saw.
    """

    path: str
    classes: list[str]
    probabilities: list[float]
    views: Tensor = field(repr=False)


@dataclass
class PredictConfig:
    """Settings of `uniformer predict`.

    Attributes:
        videos: files, folders of them, or folders of images.
        checkpoint: a file of ours, a released one by name ("uniformer_small.k400_16x8"), or any
            other file of weights together with `model`.
        model: preset that a file of bare weights belongs to.
        labels: file of class names, if the checkpoint has none.
        top: how many classes to print.
        clips: temporal clips a video.
        crops: spatial crops a clip, 1 or 3.
        sheet: PNG to write: the frames the model saw, view below view, with its prediction.
        decoder: "decord", "torchcodec" or "pyav".
        timeout: seconds that reading one video may take.
    """

    videos: list[str]
    checkpoint: str
    model: str | None = None
    labels: str | None = None
    top: int = 5
    clips: int = 1
    crops: Literal[1, 3] = 1
    sheet: str | None = None
    decoder: str = "decord"
    timeout: float = 60.0


def predict(cfg: PredictConfig) -> list[Prediction]:
    """Predict each video and print its top classes.

    Returns:
        One prediction for each video.

    Raises:
        ValueError: the checkpoint or a setting is unusable.
        VideoDecodeError: some of the videos could not be read; the others were predicted.
    """
    model = open_model(cfg.checkpoint, cfg.model)
    if cfg.labels:
        names = read_labels(cfg.labels)
        if len(names) != model.cfg.num_classes:
            raise ValueError(
                f"{cfg.labels} names {len(names)} classes, the model has {model.cfg.num_classes}"
            )
        model.classes = names
    if model.classes is None:
        print("the names of the classes are not known: give a file of them with --labels")
    if cfg.sheet and Path(cfg.sheet).suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"sheet must end as a picture does, in .png say, got {cfg.sheet}")
    paths = [p for v in cfg.videos for p in (videos_in(Path(v)) if Path(v).is_dir() else []) or [v]]
    predictions, failures = [], []
    with Decoder(cfg.decoder, cfg.timeout) as decoder:
        for path in paths:
            try:
                prediction = predict_video(model, path, cfg.top, cfg.clips, cfg.crops, decoder)
            except VideoDecodeError as error:
                failures.append(str(error))
                continue
            predictions.append(prediction)
            print(path)
            for name, p in zip(prediction.classes, prediction.probabilities, strict=True):
                print(f"  {100 * p:5.1f}%  {name}")
    if cfg.sheet and predictions:
        contact_sheet(predictions, cfg.sheet, model.input)
        print(f"contact sheet: {cfg.sheet}")
    if failures:
        count = f"{len(failures)} of {len(paths)} videos could not be read"
        raise VideoDecodeError("\n  ".join([count, *failures]))
    return predictions


@torch.inference_mode()
def predict_video(
    model: UniFormer,
    path: str | os.PathLike,
    top: int = 5,
    clips: int = 1,
    crops: int = 1,
    decoder: Decoder | None = None,
) -> Prediction:
    """Classify one video.

    Args:
        model: its `input` says how clips are made; moved to a GPU if there is one, and left in
            the mode it was in.
        path: a file, or a folder of images.
        top: how many classes to return.
        clips: temporal clips.
        crops: spatial crops a clip, 1 or 3.
        decoder: reads the video.

    Returns:
        The likeliest classes.

    Raises:
        VideoDecodeError: the video cannot be read.
        ValueError: the model has no classifier, or `top` or the views are none.
    """
    if not model.num_classes or top < 1:
        raise ValueError(
            f"there must be classes to name, got a model of {model.num_classes} and top={top}"
        )
    input = model.input or InputConfig()
    own = Decoder() if decoder is None else decoder
    dataset = TestClips([Sample(os.fspath(path), 0)], input, own, clips, crops)
    try:
        batch = dataset[0]
    finally:
        if decoder is None:
            own.close()
    if batch.failures:
        raise VideoDecodeError(batch.failures[0][1])
    views, was_training = batch.views[0], model.training
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parameter = next(model.to(device).eval().parameters())
    try:
        chances = model(views.to(parameter)).float().mean(0).softmax(0).cpu()
    finally:
        model.train(was_training)
    best = chances.topk(min(top, len(chances)))
    names = [model.classes[i] if model.classes else f"class {i}" for i in best.indices.tolist()]
    return Prediction(os.fspath(path), names, best.values.tolist(), views)


# --- Contact sheet --------------------------------------------------------------------

CELL, GAP, LINE = 112, 4, 20  # pixels: a frame, the space around it, a line of text
MAX_COLUMNS = 8
INK, FAINT = (20, 20, 20), (120, 120, 120)


def contact_sheet(
    predictions: list[Prediction],
    path: str | os.PathLike,
    input: InputConfig | None = None,
    truth: list[str] | None = None,
) -> None:
    """Write a picture: for each video what was predicted, and the frames of all its views.

    Args:
        predictions: a row for each.
        path: of the picture; its ending says which format, PNG by habit.
        input: how the views were normalised.
        truth: the right class of each video, if it is known.
    """
    input = input or InputConfig()
    font = _font()
    V, _, T = predictions[0].views.shape[:3]
    columns = min(T, MAX_COLUMNS)
    rows = -(-T // columns) * V
    height = LINE + rows * (CELL + GAP) + GAP
    sheet = Image.new("RGB", (columns * (CELL + GAP) + GAP, height * len(predictions)), "white")
    draw = ImageDraw.Draw(sheet)
    for n, prediction in enumerate(predictions):
        top = n * height
        text = f"{prediction.classes[0]}  {100 * prediction.probabilities[0]:.0f}%"
        if truth is not None and truth[n] != prediction.classes[0]:
            text += f"   (is: {truth[n]})"
        draw.text((GAP, top + 2), text, INK, font)
        end = GAP + draw.textlength(text, font)
        name = "/".join(Path(prediction.path).parts[-2:])
        draw.text((end + 12, top + 2), name, FAINT, font)
        for t, frame in enumerate(_pixels(prediction.views, input)):
            row, column = divmod(t % T, columns)
            x = GAP + column * (CELL + GAP)
            y = top + LINE + GAP + (t // T * (rows // V) + row) * (CELL + GAP)
            sheet.paste(frame.resize((CELL, CELL), Image.Resampling.BICUBIC), (x, y))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _pixels(views: Tensor, input: InputConfig) -> list[Image.Image]:
    """Frames of all views, view after view, as they were before normalisation."""
    views = views.flip(1) if input.bgr else views
    shape = (1, 3, 1, 1, 1)
    views = views * torch.tensor(input.std).view(shape) + torch.tensor(input.mean).view(shape)
    frames = views.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 4, 1).flatten(0, 1)
    return [Image.fromarray(f) for f in frames.numpy()]


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """matplotlib's, which has accents, where it is installed; else Pillow's own."""
    try:
        from matplotlib.font_manager import findfont
    except ImportError:
        return ImageFont.load_default(size=14)
    return ImageFont.truetype(findfont("DejaVu Sans"), size=13)
