"""Frames are exact, whatever the file: compared with PyAV decoding forward, pixel by pixel."""

import av
import numpy as np
import pytest
from PIL import Image

from tests.videos import pictures, write, write_all, write_broken
from uniformer.video import (
    DecordReader,
    PyAVReader,
    VideoDecodeError,
    VideoInfo,
    VideoTooShort,
    open_video,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return {p.name: p for p in write_all(tmp_path_factory.mktemp("videos"))}


NAMES = [
    "plain.mp4", "one_gop.mp4", "open_gop.mp4", "open_gop_hevc.mp4", "ten_bit.mp4",
    "edit_list.mp4", "rotated.mp4", "vfr.mp4", "b_frames.avi", "plain.avi", "vp9.webm",
    "vp8_hidden_frames.webm", "av1.mp4", "plain.mkv", "transport.ts", "program.mpg",
    "one_frame.mp4", "tall.mp4", "odd.mp4", "odd_chroma.webm", "interlaced.mp4",
    "intra_refresh.mp4",
]  # fmt: skip


def decoded_forward(path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [
            np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90 % 4)
            for f in container.decode(video=0)
        ]


def number(picture: np.ndarray) -> int:
    """Which of `pictures` this is, read from its bars."""
    return sum(int(picture[24, bit * 8 + 4].mean() > 128) << bit for bit in range(8))


def test_the_list_of_files_is_whole(files):
    assert list(files) == NAMES


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
@pytest.mark.parametrize("name", NAMES)
def test_frames_are_exact(files, name, decoder):
    truth = decoded_forward(files[name])
    reader = open_video(files[name], decoder)
    assert reader.info.frames == len(truth)
    n = len(truth)
    # Scattered, backwards, repeated, the ends: what samplers ask for and decoders trip over.
    for indices in (range(0, n, 5), range(n - 1, -1, -3), [n // 2] * 3, [0, n - 1], [n - 1]):
        got = reader.read(list(indices))
        for i, frame in zip(indices, got, strict=True):
            assert np.array_equal(frame, truth[i]), f"frame {i} of {name} by {reader.info.reader}"


def test_pixels_are_those_of_the_pictures(files):
    frames = open_video(files["plain.mp4"]).read(range(48))
    assert [number(f) for f in frames] == list(range(48))
    error = np.abs(frames.astype(int) - np.stack(list(pictures(48)))).mean()
    assert error < 6  # what compression costs


@pytest.mark.parametrize(("name", "reason"), [
    ("open_gop.mp4", "open GOP"), ("open_gop_hevc.mp4", "open GOP"), ("edit_list.mp4", "edit list"),
    ("b_frames.avi", "seeking in avi"), ("transport.ts", "seeking in mpegts"),
    ("ten_bit.mp4", "pixels convert"), ("plain.mp4", None), ("vp9.webm", None),
    ("odd.mp4", None), ("odd_chroma.webm", "chroma of odd sizes"), ("interlaced.mp4", "interlaced"),
    ("intra_refresh.mp4", "intra refresh"), ("plain.mkv", None),
])  # fmt: skip
def test_decord_serves_only_files_it_seeks_rightly_in(files, name, reason):
    info = open_video(files[name]).info
    if reason is None:
        assert (info.reader, info.note) == ("decord", None)
    else:
        assert info.reader == "pyav"
        assert reason in info.note


@pytest.mark.parametrize(
    "name", ["open_gop.mp4", "edit_list.mp4", "b_frames.avi", "intra_refresh.mp4", "interlaced.mp4"]
)
def test_decord_alone_would_be_wrong(files, name):
    """The reason for all this; if it ever passes, the detour can go."""
    truth = decoded_forward(files[name])
    packets = {"edit_list.mp4": 40}.get(name, len(truth))
    reader = DecordReader(str(files[name]), VideoInfo(packets, 25.0, "decord"))
    got = [reader.read([i])[0] for i in range(len(truth) - 1, -1, -1)][::-1]
    assert not all(np.array_equal(a, b) for a, b in zip(got, truth, strict=True))


def test_a_missing_decoder_is_said(files, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "decord", None)
    info = open_video(files["plain.mp4"]).info
    assert info.reader == "pyav"
    assert "decord cannot be loaded" in info.note
    assert "pip install" in info.note


def test_torchcodec_is_used_where_it_loads(files):
    info = open_video(files["plain.mp4"], "torchcodec").info
    try:
        from torchcodec.decoders import VideoDecoder  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        assert "torchcodec cannot be loaded" in info.note
    else:
        truth = decoded_forward(files["plain.mp4"])
        got = open_video(files["plain.mp4"], "torchcodec").read([40, 3])
        assert info.reader == "torchcodec"
        assert np.array_equal(got, np.stack([truth[40], truth[3]]))


def test_broken_files_raise_with_their_name(tmp_path):
    for name, path in write_broken(tmp_path).items():
        with pytest.raises(VideoDecodeError, match=path.name):
            open_video(path)
        assert name


def test_reading_past_the_end_says_how_long_it_is(files):
    reader = PyAVReader(str(files["plain.mp4"]), VideoInfo(60, 25.0, "pyav"))
    with pytest.raises(VideoTooShort) as caught:
        reader.read([50])
    assert caught.value.info.frames == 48
    assert "fewer frames decode" in caught.value.info.note


def test_a_folder_of_images_is_a_video(tmp_path):
    for i, picture in enumerate(pictures(5), start=1):
        Image.fromarray(picture).save(tmp_path / f"img_{i:05}.png")
    reader = open_video(tmp_path)
    assert reader.info.frames == reader.count() == 5
    assert [number(f) for f in reader.read([4, 0, 0])] == [4, 0, 0]


def test_a_folder_of_images_of_different_sizes_is_refused(tmp_path):
    for i, size in enumerate([32, 40]):
        Image.new("RGB", (size, size)).save(tmp_path / f"{i}.png")
    with pytest.raises(VideoDecodeError, match="differ in size"):
        open_video(tmp_path).read([0, 1])


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(VideoDecodeError, match="the folder has no"):
        open_video(tmp_path)


def test_unknown_decoders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="decord, torchcodec, pyav"):
        open_video(write(tmp_path / "v.mp4", frames=2), "opencv")


def test_a_stream_that_changes_its_size_keeps_the_first(tmp_path):
    """As ffmpeg does; two transport streams, one after the other, are one."""
    small = write(tmp_path / "a.ts", frames=5)
    large = write(tmp_path / "b.ts", frames=5, height=128, width=160)
    both = tmp_path / "both.ts"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    frames = open_video(both).read(range(8))
    assert frames.shape[1:3] == (64, 96)
