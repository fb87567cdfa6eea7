"""The demo in miniature; `make demo` runs it whole."""

import json

import numpy as np
import pytest
from PIL import Image

from uniformer.demo import DemoConfig, demo
from uniformer.digits import CLASSES, FRAMES, HEIGHT, WIDTH, _clip, build_digits
from uniformer.lists import read_videos
from uniformer.video import open_video


def test_the_demo_runs_to_its_end_twice(tmp_path, capsys):
    out = tmp_path / "demo"
    cfg = DemoConfig(str(out), epochs=1, share=0.02)
    demo(cfg)
    printed = capsys.readouterr().out
    assert "top-1 on unseen digits" in printed
    assert "frames in random order" in printed
    for name in ("curves.png", "contact_sheet.png"):
        with Image.open(out / name) as image:
            assert min(image.size) > 200
    assert json.loads((out / "test.json").read_text())["settings"]["crops"] == 3
    assert (out / "run/best.safetensors").is_file()
    result = json.loads((out / "result.json").read_text())
    assert 0 <= result["top1_frames_in_random_order"] <= 100
    demo(cfg)  # finished: it trains again rather than do nothing
    assert "epoch   1/1" in capsys.readouterr().out


@pytest.mark.parametrize("bad", [{"share": 0.0}, {"share": 1.5}, {"epochs": 0}], ids=str)
def test_impossible_demos_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        DemoConfig(**bad)


def test_clips_are_real_videos_of_the_eight_motions(digits):
    videos = read_videos(digits, "train")
    assert set(videos.classes) == set(CLASSES)
    info = open_video(videos.samples[0].path).info
    assert info.frames == FRAMES


def test_building_twice_is_building_once(digits):
    video = next(digits.glob("train/*/*.mp4"))
    before = video.stat().st_mtime_ns
    build_digits(digits, share=0.04)
    assert video.stat().st_mtime_ns == before


def centre(frames):
    """Centroid of the ink of each frame, (T, 2), and its area."""
    ink = np.abs(frames.astype(float) - np.median(frames, axis=(1, 2), keepdims=True)).sum(-1)
    ink[ink < 60] = 0
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    total = ink.sum((1, 2))
    at = np.stack([(ink * g).sum((1, 2)) / total for g in (rows, columns)], axis=1)
    return at, (ink > 0).sum((1, 2))


@pytest.mark.parametrize(("name", "axis", "sign"), [
    ("move left", 1, -1), ("move right", 1, 1), ("move up", 0, -1), ("move down", 0, 1),
])  # fmt: skip
def test_motions_go_where_they_are_said_to(name, axis, sign):
    digit = np.zeros((8, 8))
    digit[2:6, 3:5] = 1
    at, _ = centre(_clip(digit, name, np.random.default_rng(0)))
    moved = at[-1] - at[0]
    assert sign * moved[axis] > 12
    assert abs(moved[1 - axis]) < 4


@pytest.mark.parametrize(("name", "sign"), [("grow", 1), ("shrink", -1)])
def test_sizes_change_as_they_are_said_to(name, sign):
    _, area = centre(_clip(np.ones((8, 8)), name, np.random.default_rng(0)))
    assert sign * (area[-1] - area[0]) > 0.3 * area.mean()


@pytest.mark.parametrize(("name", "sign"), [("turn clockwise", 1), ("turn counterclockwise", -1)])
def test_turns_turn_as_they_are_said_to(name, sign):
    """A hand that points up turns towards the right when it turns clockwise."""
    digit = np.zeros((8, 8))
    digit[0:4, 3:5] = 1
    frames = _clip(digit, name, np.random.default_rng(0))
    at, _ = centre(frames)
    first, last = at[0], at[-1]
    assert sign * (last[1] - first[1]) > 2
