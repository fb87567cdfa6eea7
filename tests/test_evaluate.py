"""Scores, views, and files that cannot be read."""

import json
import math

import pytest
import torch

import uniformer.evaluate as module
from uniformer import InputConfig, create_model, save_checkpoint
from uniformer.data import TestClips, make_loader
from uniformer.decoder import Decoder
from uniformer.evaluate import TestConfig, evaluate, make_accelerator
from uniformer.lists import Sample, read_videos
from uniformer.video import VideoDecodeError

INPUT = InputConfig(frames=4, stride=4, size=32)


@pytest.fixture
def model():
    model = create_model("uniformer_nano", 8, depths=(1, 1, 1, 1), dims=(8, 8, 32, 32)).eval()
    model.input = INPUT
    return model


@pytest.fixture
def checkpoint(model, digits, tmp_path):
    model.classes = read_videos(digits, "val").classes
    save_checkpoint(tmp_path / "w.safetensors", model)
    return str(tmp_path / "w.safetensors")


def test_logits_of_all_views_are_summed(model, digits):
    samples = read_videos(digits, "val").samples[:3]
    with Decoder() as decoder:
        clips = TestClips(samples, INPUT, decoder, clips=2, crops=3)
        result = evaluate(model, make_loader(clips, 2, 0), make_accelerator())
        with torch.no_grad():
            for i in range(3):
                want = sum(model(view[None])[0].double() for view in clips[i].views[0])
                torch.testing.assert_close(result.logits[i], want, rtol=1e-4, atol=1e-4)
    assert result.labels.tolist() == [s.label for s in samples]


def test_scores(monkeypatch):
    """Six videos, right on four; one class all wrong, one without videos."""
    logits = torch.eye(6, dtype=torch.float64)[[0, 0, 1, 2, 1, 3]] * 2
    logits[4, 5] = 1.0  # second choice
    rows = {i: (label, logits[i]) for i, label in enumerate([0, 0, 1, 2, 5, 5])}
    result = module._score(rows, {"bad.mp4": "why"})
    assert result.top1 == pytest.approx(100 * 4 / 6)
    assert result.mean_class == pytest.approx(75.0)
    assert result.top5 >= result.top1
    assert result.videos == 6
    text = module.summary(result)
    assert "1 videos could not be read and count in no accuracy:\n  why" in text


def test_accuracy_in_the_top_five_with_fewer_classes():
    rows = {0: (1, torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64))}
    assert module._score(rows, {}).top5 == 100


def test_unreadable_videos_count_in_no_accuracy(model, digits, tmp_path, caplog):
    samples = read_videos(digits, "val").samples[:4]
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    samples = [samples[0], Sample(str(tmp_path / "bad.mp4"), 0), *samples[1:]]
    with Decoder() as decoder:
        loader = make_loader(TestClips(samples, INPUT, decoder), 2, 0)
        result = evaluate(model, loader, make_accelerator())
    assert result.videos == 4
    assert result.indices.tolist() == [0, 2, 3, 4]
    assert list(result.unreadable) == [str(tmp_path / "bad.mp4")]
    assert sum("bad.mp4" in r.message for r in caplog.records) == 1


def test_the_model_is_left_in_the_mode_it_was_in(model, digits):
    with Decoder() as decoder:
        loader = make_loader(
            TestClips(read_videos(digits, "val").samples[:2], INPUT, decoder), 2, 0
        )
        evaluate(model.train(), loader, make_accelerator())
    assert model.training


def test_nothing_readable_is_no_accuracy(model, checkpoint, tmp_path):
    with Decoder() as decoder:
        loader = make_loader(TestClips([Sample(str(tmp_path / "x.mp4"), 0)], INPUT, decoder), 1, 0)
        result = evaluate(model, loader, make_accelerator())
    assert (result.videos, len(result.unreadable)) == (0, 1)
    assert math.isnan(result.top1)
    (tmp_path / "list.csv").write_text("gone.mp4,0\n")
    with pytest.raises(VideoDecodeError, match="none of the 1 videos could be read"):
        module.test(TestConfig(checkpoint, str(tmp_path / "list.csv"), workers=0))


def test_labels_beyond_the_model_are_an_error():
    with pytest.raises(ValueError, match="label 9 in the data, but the model has 3 classes"):
        module._score({0: (9, torch.zeros(3, dtype=torch.float64))}, {})


def test_the_command_writes_its_result(checkpoint, digits, tmp_path, capsys):
    out = tmp_path / "deep/result.json"
    cfg = TestConfig(checkpoint, str(digits), clips=2, crops=3, workers=0, out=str(out))
    result = module.test(cfg)
    written = json.loads(out.read_text())
    assert written["top1"] == result.top1
    assert written["settings"]["crops"] == 3
    assert len(written["predictions"]) == written["videos"] == 8
    assert {"path", "label", "predicted"} == set(written["predictions"][0])
    assert "2 clips x 3 crops" in capsys.readouterr().out


def test_class_folders_are_matched_by_name(checkpoint, digits, tmp_path):
    """A data set with fewer classes than the model, in another order."""
    for name in ("grow", "move up"):
        (tmp_path / "data" / name).mkdir(parents=True)
        video = next((digits / "val" / name).iterdir())
        (tmp_path / "data" / name / "v.mp4").write_bytes(video.read_bytes())
    result = module.test(TestConfig(checkpoint, str(tmp_path / "data"), workers=0))
    classes = read_videos(digits, "val").classes
    assert result.labels.tolist() == [classes.index("grow"), classes.index("move up")]
    (tmp_path / "data/wave").mkdir()
    (tmp_path / "data/wave/v.mp4").write_bytes(video.read_bytes())
    with pytest.raises(ValueError, match="wave is none of the 8 known classes"):
        module.test(TestConfig(checkpoint, str(tmp_path / "data"), workers=0))


def test_precision_may_change_from_run_to_run():
    assert make_accelerator(mixed_precision="bf16").mixed_precision == "bf16"
    assert make_accelerator(mixed_precision="no").mixed_precision == "no"
