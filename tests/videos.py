"""Real video files of every awkward kind, made with PyAV; frames carry their number as bars."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

HEIGHT, WIDTH = 64, 96
X264 = {"g": "12", "bf": "2", "crf": "12"}


def pictures(count: int, height: int = HEIGHT, width: int = WIDTH):
    """Frames (height, width, 3): the bits of their number, and a block that moves."""
    for i in range(count):
        picture = np.zeros((height, width, 3), np.uint8)
        for bit in range(8):
            if i >> bit & 1:
                picture[8:40, bit * 8 + 1 : bit * 8 + 7] = 255
        picture[44:60, i * 3 % width : i * 3 % width + 10, 0] = 200
        yield picture


def write(path: Path, codec: str = "libx264", frames: int = 48, options=None, **changes) -> Path:
    """Encode `frames` pictures; `changes`: height, width, pix_fmt, times (milliseconds)."""
    height, width = changes.get("height", HEIGHT), changes.get("width", WIDTH)
    times = changes.get("times")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or X264)
        stream.height, stream.width = height, width
        stream.pix_fmt = changes.get("pix_fmt", "yuv420p")
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, picture in enumerate(pictures(frames, height, width)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut(source: Path, path: Path, start: int) -> Path:
    """Copy packets from the keyframe before `start`; an edit list hides the frames up to it."""
    with (
        av.open(str(source)) as reader,
        av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as writer,
    ):
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        packets = [p for p in reader.demux(stream) if p.size]
        shown = sorted(p.pts for p in packets)[start]
        key = max(p.pts for p in packets if p.is_keyframe and p.pts <= shown)
        first = next(i for i, p in enumerate(packets) if p.is_keyframe and p.pts == key)
        for packet in packets[first:]:
            packet.pts -= shown
            packet.dts -= shown
            packet.stream = copy
            writer.mux(packet)
    return path


def rotate(source: Path, path: Path) -> Path:
    """Give an mp4 the display matrix of a phone held upright."""
    data = bytearray(source.read_bytes())
    matrix = data.find(b"tkhd") + 4 + 4 + 20 + 16  # type, version and flags, times, layer
    turned = (0, 65536, 0, -65536, 0, 0, HEIGHT * 65536, 0, 1 << 30)
    data[matrix : matrix + 36] = struct.pack(">9i", *turned)
    path.write_bytes(data)
    return path


def write_all(folder: Path) -> list[Path]:
    """A file of each kind that a decoder was seen to read wrongly, and of the usual ones."""
    rng = np.random.default_rng(0)
    x265 = "log-level=error"
    mpeg4 = {"g": "12", "b": "2M"}
    plain = write(folder / "plain.mp4")
    return [
        plain,
        write(folder / "one_gop.mp4", options={"g": "250", "bf": "3"}),
        write(
            folder / "open_gop.mp4",
            options={"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"},
        ),
        write(
            folder / "open_gop_hevc.mp4",
            "libx265",
            options={"g": "12", "x265-params": f"{x265}:open-gop=1"},
        ),
        write(
            folder / "ten_bit.mp4",
            "libx265",
            options={"x265-params": x265},
            pix_fmt="yuv420p10le",
        ),
        cut(plain, folder / "edit_list.mp4", start=17),
        rotate(plain, folder / "rotated.mp4"),
        write(folder / "vfr.mp4", times=np.cumsum(rng.integers(20, 80, 48)).tolist()),
        write(folder / "b_frames.avi", "mpeg4", options=mpeg4 | {"bf": "2"}),
        write(folder / "plain.avi", "mpeg4", options=mpeg4 | {"bf": "0"}),
        write(folder / "vp9.webm", "libvpx-vp9", options={"g": "12", "b": "1M"}),
        write(
            folder / "vp8_hidden_frames.webm",
            "libvpx",
            options={"g": "16", "b": "1M", "auto-alt-ref": "1", "lag-in-frames": "16"},
        ),
        write(folder / "av1.mp4", "libsvtav1", options={"g": "12", "svtav1-params": "tune=0"}),
        write(folder / "plain.mkv"),
        write(folder / "transport.ts"),
        write(folder / "program.mpg", "mpeg2video", options={"bf": "2", "g": "12", "b": "3M"}),
        write(folder / "one_frame.mp4", frames=1),
        write(folder / "tall.mp4", height=96, width=64),
        write(folder / "odd.mp4", height=65, width=97, pix_fmt="yuv444p"),
        write(folder / "odd_chroma.webm", "libvpx-vp9", options={"b": "1M"}, height=65, width=97),
        write(folder / "interlaced.mp4", options=X264 | {"flags": "+ilme+ildct"}),
        write(
            folder / "intra_refresh.mp4",
            options={"g": "12", "bf": "0", "x264-params": "intra-refresh=1:keyint=12"},
        ),
    ]


def write_broken(folder: Path) -> dict[str, Path]:
    """Files that no decoder can make sense of, by what is wrong with them."""
    good = write(folder / "good.mp4").read_bytes()
    broken = {
        "empty": b"",
        "text": b"<html>not found</html>",
        "noise": np.random.default_rng(0).bytes(5000),
        "truncated": good[: len(good) // 2],
        "no index": good.replace(b"moov", b"moow"),
    }
    paths = {}
    for name, data in broken.items():
        paths[name] = folder / f"{name}.mp4"
        paths[name].write_bytes(data)
    with av.open(str(folder / "audio only.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return paths | {"audio only": folder / "audio only.mp4", "missing": folder / "missing.mp4"}
