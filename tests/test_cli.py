"""The command as users run it: on a folder of their own videos, with mistakes, and killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.videos import write
from uniformer import read_checkpoint
from uniformer.cli import COMMANDS, main
from uniformer_kernels import _runtime

NETWORK = [
    "--model", "uniformer_nano", "--overrides.depths", "[1,1,1,1]",
    "--overrides.dims", "[8,16,16,24]", "--overrides.head_dim", "8",
    "--input.frames", "4", "--input.stride", "2", "--input.size", "32",
    "--batch_size", "4", "--lr", "1e-3",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Two classes; mp4, avi with B-frames, webm, an upright one, a single frame, a corrupt one."""
    base = tmp_path / "my videos"
    for name in ("wave", "jump high"):
        (base / name).mkdir(parents=True)
        for i in range(3):
            write(base / name / f"clip {i}.mp4", frames=15 + i)
        write(base / name / "old.avi", "mpeg4", 20, {"bf": "2", "b": "1M"})
        write(base / name / "web.webm", "libvpx-vp9", 20, {"b": "1M"})
        write(base / name / "phone.MP4", height=96, width=64)
        write(base / name / "one.mp4", frames=1)
    good = (base / "wave/clip 0.mp4").read_bytes()
    (base / "wave/corrupt.mp4").write_bytes(good[:1000])
    return base


def test_a_folder_of_ones_own_videos(folder, tmp_path, capsys):
    run, manifest = str(tmp_path / "run"), str(tmp_path / "manifest.jsonl")
    main(["scan", str(folder), "--manifest", manifest])
    printed = capsys.readouterr().out
    assert "15 videos, 14 readable, 1 not" in printed

    main(["train", "--data", str(folder), "--out", run, "--epochs", "2", *NETWORK])
    printed = capsys.readouterr().out
    assert "2 of its 15 videos, a fifth of each class, are held out" in printed
    assert "best: epoch" in printed
    assert "seeking in avi is not exact" in printed
    assert printed.count("corrupt.mp4") <= 2  # named once, whichever split has it
    unreadable = json.loads((tmp_path / "run/unreadable.json").read_text())
    assert [os.path.basename(p) for p in unreadable] == ["corrupt.mp4"]

    out = tmp_path / "result.json"
    main([
        "test", "--checkpoint", f"{run}/best.safetensors", "--data", str(folder), "--clips", "2",
        "--crops", "3", "--out", str(out), "--shuffle_frames",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert "all 15 of its videos are tested" in printed
    assert "split test, 2 clips x 3 crops" in printed
    assert "(14 videos)" in printed
    assert "1 videos could not be read" in printed
    assert sum("corrupt.mp4" in line for line in printed.splitlines()) == 1
    assert "top-5" not in printed  # of two classes
    assert json.loads(out.read_text())["settings"]["shuffle_frames"] is True

    sheet = str(tmp_path / "sheet.png")
    video = str(folder / "wave/phone.MP4")
    main(["predict", video, "--checkpoint", f"{run}/best.safetensors", "--sheet", sheet])
    printed = capsys.readouterr().out
    assert "wave" in printed
    assert "jump high" in printed
    assert os.path.getsize(sheet) > 1000


def test_a_manifest_keeps_broken_files_out_of_training(folder, tmp_path, capsys):
    manifest = str(tmp_path / "manifest.jsonl")
    main(["scan", str(folder), "--manifest", manifest])
    main([
        "train", "--data", str(folder), "--out", str(tmp_path / "run"), "--epochs", "1",
        "--manifest", manifest, *NETWORK,
    ])  # fmt: skip
    assert "left out as unreadable" in capsys.readouterr().out


def test_settings_come_from_yaml_and_flags(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        main(["train", "--data", str(folder), *NETWORK, "--print_config"])
    assert not done.value.code
    config = tmp_path / "config.yaml"
    config.write_text(capsys.readouterr().out)
    assert "frames: 4" in config.read_text()
    run = tmp_path / "run"
    main(["train", "--config", str(config), "--epochs", "1", "--out", str(run), "--seed", "5"])
    settings = json.loads((run / "settings.json").read_text())
    assert (settings["seed"], settings["input"]["frames"], settings["lr"]) == (5, 4, 1e-3)
    main(["train", "--config", str(run / "settings.json")])  # what a run leaves is a config too
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["train", "--data", "/nowhere"], "uniformer train: /nowhere is neither a folder"),
    (["predict", "v.mp4", "--checkpoint", "nothing"], "neither a file nor the name of a released"),
    (["predict", "v.mp4", "--checkpoint", "uniformer_small.k400_16x4"], "drive.google.com"),
    (["train", "--data", "x", "--input.size", "8"], "size must be at least 32 pixels, got 8"),
    (["info", "resnet"], "no model is named 'resnet'"),
    (["scan", "/nowhere"], "neither a folder"),
    (["test", "--checkpoint", "x", "--data", "y"], "neither a file nor the name"),
], ids=lambda a: a[0] if isinstance(a, list) else "")  # fmt: skip
def test_mistakes_end_with_a_sentence(arguments, complaint, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(SystemExit, match=complaint):
        main(arguments)


@pytest.mark.parametrize("command", ["doctor", "info"])
def test_a_mistaken_backend_ends_with_a_sentence(command, monkeypatch):
    monkeypatch.setattr(_runtime, "_current", "cudda")  # as UNIFORMER_BACKEND sets it
    with pytest.raises(SystemExit, match=r"UNIFORMER_BACKEND must be one of auto, .*'cudda'"):
        main([command])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it runs")
def test_a_backend_that_cannot_run_is_told_before_anything_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_runtime, "_current", "cuda")
    with pytest.raises(SystemExit, match="is cuda, which cannot run here: there is no CUDA device"):
        main(["train", "--data", "x", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
    main(["doctor"])
    printed = capsys.readouterr().out
    assert "UNIFORMER_BACKEND asks for cuda; operators without it run as with auto" in printed


@pytest.mark.parametrize("arguments", [
    [], ["fly"], ["train"], ["train", "--data", "x", "--epochs", "many"],
    ["predict", "--checkpoint", "x"],
    ["train", "--data", "x", "--no_such_flag", "1"],
], ids=" ".join)  # fmt: skip
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2
    assert "usage: uniformer" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_explained(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert not done.value.code
    text = capsys.readouterr().out
    assert "usage: uniformer" in text
    assert "<unset>" not in text


def test_a_worker_that_finds_nothing_readable_says_so_in_a_sentence(folder, tmp_path):
    for video in folder.glob("*/*.*"):
        video.write_bytes(b"no video")
    with pytest.raises(SystemExit) as done:
        main(["train", "--data", str(folder), "--out", str(tmp_path / "run"), *NETWORK])
    text = str(done.value.code)
    assert text.startswith("uniformer train: 50 videos in a row could not be read")
    assert "Traceback" not in text


def test_output_that_nobody_reads_is_no_traceback():
    command = f"{sys.executable} -m uniformer info --zoo | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=100)
    assert done.stderr == ""
    assert "name" in done.stdout


def test_ctrl_c_says_how_to_go_on(digits, tmp_path):
    command = [
        sys.executable, "-m", "uniformer", "train", "--data", str(digits), "--out",
        str(tmp_path / "run"), "--epochs", "500", "--checkpoint_every", "1", *NETWORK,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        # A shell starts what it runs in the background deaf to it, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("run/checkpoint-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it, to the workers too
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "the same command goes on from the last checkpoint" in errors
    assert "Traceback" not in errors


def test_a_run_killed_by_the_system_goes_on(digits, tmp_path):
    """SIGKILL in the second epoch; the same command again reaches the unbroken run's weights."""

    def command(out):
        return [
            sys.executable, "-m", "uniformer", "train", "--data", str(digits), "--out", str(out),
            "--epochs", "3", "--workers", "1", "--checkpoint_every", "3", *NETWORK,
            "--overrides.drop_path_rate", "0.3",
        ]  # fmt: skip

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True, timeout=300)
    killed = subprocess.Popen(command(tmp_path / "killed"), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (tmp_path / "killed/checkpoint-15").exists():
        assert killed.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed/checkpoint-36").exists()
    again = subprocess.run(
        command(tmp_path / "killed"), check=True, capture_output=True, text=True, timeout=300
    )
    assert "going on at" in again.stdout
    whole, resumed = (
        read_checkpoint(tmp_path / name / "last.safetensors").weights
        for name in ("whole", "killed")
    )
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
