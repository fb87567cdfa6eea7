"""Exact video frames, whatever the file.

decord is fast but seeks to wrong frames in some files (open GOP, edit lists, B-frames without
timestamps, MPEG transport streams) without a word. So the packets of every file are read first,
which costs a millisecond or two: where they prove that seeking is right, decord serves the file;
every other file is decoded by PyAV from its first frame on.

Decoders hang and crash: `uniformer.decoder` runs this in a process that may.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

__all__ = ["DECODERS", "Reader", "VideoDecodeError", "VideoInfo", "VideoTooShort", "open_video"]

DECODERS = ("decord", "torchcodec", "pyav")
IMAGES = (".jpg", ".jpeg", ".png")

# Containers in which seeking was compared with decoding forward, frame by frame, and held. Not in
# avi (no timestamps for B-frames), mpegts and mpeg: there decord returned other frames.
SEEKABLE = ("mov", "matroska", "webm")
EIGHT_BIT = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p")


class VideoDecodeError(RuntimeError):
    """A file is missing, is no video, is damaged, or kept its decoder busy for too long."""


class VideoTooShort(Exception):
    """A video ends before a frame asked for; `info` says how many there are."""

    def __init__(self, promised: "VideoInfo", frames: int) -> None:
        super().__init__()
        note = "fewer frames decode than its packets promise"
        self.info = replace(promised, frames=frames, note=note)


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video once it is open.

    Attributes:
        frames: how many there are.
        fps: frames a second, on average; 0 where the file does not say.
        reader: which decoder serves it.
        note: why not the one that was asked for, if so.
    """

    frames: int
    fps: float
    reader: str
    note: str | None = None


class Reader(Protocol):
    """An open video."""

    info: VideoInfo

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames (n, H, W, 3), uint8 RGB, in the order of `indices`; repeats are fine.

        Raises:
            VideoTooShort: the video ends before one of them.
        """

    def count(self) -> int:
        """Decode all frames, and say how many there are."""


# --- Readers --------------------------------------------------------------------------


class PyAVReader:
    """PyAV, decoding from the first frame up to the last one wanted."""

    def __init__(self, path: str, info: VideoInfo) -> None:
        self.path = path
        self.info = info

    def read(self, indices: Sequence[int]) -> np.ndarray:
        wanted, last = set(indices), max(indices)
        found: dict[int, np.ndarray] = {}
        seen, size = 0, None
        for frame in self._frames():
            size = size or (frame.width, frame.height)
            if seen in wanted:
                # A stream may change its size on the way; ffmpeg scales to the first, too.
                pixels = frame.to_ndarray(format="rgb24", width=size[0], height=size[1])
                # ffmpeg and decord show a phone's video upright; PyAV leaves it as stored.
                turns = frame.rotation // 90 % 4 if frame.rotation % 90 == 0 else 0
                found[seen] = np.rot90(pixels, turns)
            seen += 1
            if seen > last:
                return np.stack([found[i] for i in indices])
        raise VideoTooShort(self.info, seen)

    def count(self) -> int:
        return sum(1 for _ in self._frames())

    def _frames(self) -> Iterator[Any]:
        import av

        with av.open(self.path) as container:
            stream = container.streams.video[_best_video(container)]
            stream.codec_context.thread_count = 1  # workers are the parallelism
            yield from container.decode(stream)


class DecordReader(PyAVReader):
    """decord or its fork decord2, seeking; only for files whose packets allow it."""

    def __init__(self, path: str, info: VideoInfo) -> None:
        import decord

        super().__init__(path, info)
        # One thread: its automatic count was measured slower.
        self.video = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        if len(self.video) != info.frames:
            raise RuntimeError(f"decord counts {len(self.video)} frames, packets {info.frames}")

    def read(self, indices: Sequence[int]) -> np.ndarray:
        return self.video.get_batch(list(indices)).asnumpy()


class TorchcodecReader(PyAVReader):
    """torchcodec, seeking; only for files whose packets allow it."""

    def __init__(self, path: str, info: VideoInfo) -> None:
        from torchcodec.decoders import VideoDecoder

        super().__init__(path, info)
        self.video = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        return self.video.get_frames_at(list(indices)).data.numpy()


class FrameFolderReader:
    """A folder of images, one a frame, in the order of their names."""

    def __init__(self, path: str) -> None:
        names = sorted(n for n in os.listdir(path) if n.lower().endswith(IMAGES))
        if not names:
            raise VideoDecodeError(f"{path}: the folder has no {', '.join(IMAGES)} images")
        self.files = [os.path.join(path, n) for n in names]
        self.info = VideoInfo(len(names), 0.0, "images")

    def count(self) -> int:
        """Images that really decode."""
        for i in range(len(self.files)):
            self.read([i])
        return len(self.files)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        from PIL import Image

        frames = []
        for i in indices:
            with Image.open(self.files[i]) as image:
                frames.append(np.asarray(image.convert("RGB")))
        if len({f.shape for f in frames}) > 1:
            raise VideoDecodeError(f"{self.files[0]} and the frames after it differ in size")
        return np.stack(frames)


SEEKING: dict[str, Callable[[str, VideoInfo], Reader]] = {
    "decord": DecordReader,
    "torchcodec": TorchcodecReader,
}


# --- Choosing a reader ----------------------------------------------------------------


def open_video(path: str | os.PathLike, decoder: str = "decord") -> Reader:
    """Open a video in this process, with the reader that delivers its frames exactly.

    Args:
        path: a file, or a folder of images.
        decoder: "decord", "torchcodec" or "pyav"; the first two are used where seeking is right.

    Returns:
        A reader; its `info.note` says why it is not the one asked for, if so.

    Raises:
        VideoDecodeError: not a video that can be read.
        ValueError: `decoder` is none of the three.
    """
    if decoder not in DECODERS:
        raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
    path = os.fspath(path)
    if os.path.isdir(path):
        return FrameFolderReader(path)
    if not os.path.isfile(path):
        raise VideoDecodeError(f"{path}: no such file")
    try:
        frames, fps, why = _scan_packets(path)
    except ImportError as error:
        raise VideoDecodeError(f"no video can be read: {error}; {_INSTALL}") from error
    except Exception as error:  # av.error.* and what its wrappers let through
        raise VideoDecodeError(f"{path}: {error_text(error)}") from error
    if not frames:
        raise VideoDecodeError(f"{path}: it has no video frames")

    if decoder != "pyav" and why is None:
        try:
            return SEEKING[decoder](path, VideoInfo(frames, fps, decoder))
        except (ImportError, OSError) as error:
            why = f"{decoder} cannot be loaded ({error_text(error)}); {_INSTALL}"
        except Exception:  # DECORDError and RuntimeError, by library and codec
            why = f"{decoder} cannot open it"
    info = VideoInfo(frames, fps, decoder)
    return (
        PyAVReader(path, replace(info, reader="pyav"))
        if decoder == "pyav"
        else forward(path, info, why or "")
    )


def forward(path: str, info: VideoInfo, why: str) -> PyAVReader:
    """The reader that decodes from the first frame on, with a note of why."""
    note = f"{why}: decoded by PyAV from the first frame"
    return PyAVReader(path, replace(info, reader="pyav", note=note))


_INSTALL = "pip install 'uniformer[video]'"


def _scan_packets(path: str) -> tuple[int, float, str | None]:
    """Number of frames, frames a second, and why seeking cannot be trusted, or None."""
    import av

    with av.open(path) as container:
        stream = container.streams.video[_best_video(container)]
        fps = float(stream.average_rate or 0)
        codec = stream.codec_context
        packets, anew = [], True
        for p in container.demux(stream):
            if p.size:
                packets.append((p.pts, p.is_keyframe, p.is_discard))
                if p.is_keyframe and codec.name == "h264":
                    anew = anew and _has_idr(bytes(p), codec.extradata or b"")
        why = _why_not_seek(packets, container.format.name.split(","), codec.pix_fmt)
        why = why or _why_not_convert(codec)
    if not anew:
        why = why or "keyframes do not start anew (intra refresh)"
    return sum(not discard for *_, discard in packets), fps, why


def _has_idr(packet: bytes, extradata: bytes) -> bool:
    """Whether an H.264 keyframe is an IDR picture: a recovery point passes for a keyframe too."""
    if extradata[:1] != b"\x01":  # Annex B: units after start codes
        return any(unit[:1] and unit[0] & 31 == 5 for unit in packet.split(b"\0\0\1")[1:])
    width, at = (extradata[4] & 3) + 1, 0  # avcC: units after their lengths
    while at + width < len(packet):
        if packet[at + width] & 31 == 5:
            return True
        at += width + int.from_bytes(packet[at : at + width], "big")
    return False


def _why_not_convert(codec: Any) -> str | None:
    """Why decord's colours would differ from ffmpeg's, or None."""
    if (codec.width % 2 or codec.height % 2) and not codec.pix_fmt.endswith("444p"):
        return "chroma of odd sizes converts inexactly"
    if codec.field_order > 1:  # neither unknown nor progressive
        return "chroma of interlaced frames converts inexactly"
    return None


def _best_video(container: Any) -> int:
    """Which video stream to read: a picture of an album cover is one too."""
    best = container.streams.best("video")
    if best is None:
        raise VideoDecodeError("it has no video stream")
    return list(container.streams.video).index(best)


def _why_not_seek(packets: list, formats: list[str], pixels: str | None) -> str | None:
    times = [pts for pts, _, _ in packets]
    if not set(formats) & set(SEEKABLE):
        return f"seeking in {formats[0]} is not exact"
    if pixels not in EIGHT_BIT:
        return f"{pixels} pixels convert inexactly"
    if None in times or len(set(times)) < len(times):
        return "frames have no timestamps of their own"
    if any(discard for *_, discard in packets) or min(times, default=0) < 0:
        return "an edit list hides frames"
    key = None
    for pts, is_key, _ in packets:  # in decoding order
        if is_key:
            key = pts
        elif key is None or pts < key:
            return "frames refer across keyframes (open GOP)"
    return None


def error_text(error: BaseException) -> str:
    """One line of what went wrong."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the path, which every message begins with
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
