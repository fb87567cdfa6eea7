"""Training: it learns, survives broken files, and goes on after a kill as if nothing had been."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tqdm import tqdm

import uniformer.train as module
from uniformer import (
    CheckpointError,
    InputConfig,
    create_model,
    load_model,
    read_checkpoint,
    save_checkpoint,
)
from uniformer.lists import read_videos
from uniformer.optim import cosine_with_warmup, make_optimizer
from uniformer.train import TrainConfig, train
from uniformer.transforms import AugmentConfig

TINY = {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 24], "head_dim": 8, "drop_path_rate": 0.3}


@pytest.fixture
def cfg(digits, tmp_path):
    return TrainConfig(
        data=str(digits),
        out=str(tmp_path / "run"),
        model="uniformer_nano",
        overrides=TINY,
        input=InputConfig(frames=4, stride=4, size=32),
        augment=AugmentConfig(scale=(0.7, 1.0), flip=0.0),
        epochs=3,
        batch_size=8,
        lr=1e-3,
        workers=0,
    )


def weights(path):
    return read_checkpoint(path).weights


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


class Killed(BaseException):
    pass


def kill_at(monkeypatch, step):
    """End the process, as far as `train` can tell, before the given step of the optimizer."""
    real = module.Trainer.train_step

    def train_step(self, batch, sums):
        if self.progress.step == step:
            raise Killed
        return real(self, batch, sums)

    monkeypatch.setattr(module.Trainer, "train_step", train_step)


def test_a_run_leaves_weights_metrics_and_settings(cfg, digits):
    best = train(cfg)
    model = load_model(best)
    assert model.classes == read_videos(digits, "train").classes
    assert model.input == cfg.input
    assert model.cfg.drop_path_rate == 0.3
    history = json.loads((best.parent / "metrics.json").read_text())
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert history[-1]["lr"] == pytest.approx(1e-6)
    assert json.loads((best.parent / "settings.json").read_text())["lr"] == 1e-3
    assert len(list(best.parent.glob("checkpoint-*"))) == cfg.keep
    assert not list(best.parent.glob(".partial*"))


def test_it_learns(cfg):
    """Few clips, no augmentation: the network can learn them by heart."""
    cfg = replace(
        cfg, epochs=15, lr=3e-3, label_smoothing=0.0, overrides=TINY | {"drop_path_rate": 0.0},
        augment=AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0),
    )  # fmt: skip
    best = train(cfg)
    history = json.loads((best.parent / "metrics.json").read_text())
    assert history[0]["train_loss"] > 1.9
    assert history[-1]["train_top1"] > 70


# In the first epoch, before any checkpoint; inside the second; at the first step of the third.
@pytest.mark.parametrize("step", [3, 9, 12])
def test_a_killed_run_reaches_the_numbers_of_an_unbroken_one(cfg, monkeypatch, step):
    unbroken = train(replace(cfg, out=cfg.out + "-unbroken")).parent
    cfg = replace(cfg, checkpoint_every=2)
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            train(cfg)
    torch.manual_seed(999)  # another process has another state
    resumed = train(cfg).parent
    for name in ("best.safetensors", "last.safetensors"):
        assert same(weights(unbroken / name), weights(resumed / name))
    histories = [json.loads((p / "metrics.json").read_text()) for p in (unbroken, resumed)]
    assert histories[0] == histories[1]


def test_a_kill_while_a_checkpoint_is_written_costs_that_checkpoint_alone(cfg, monkeypatch):
    unbroken = train(replace(cfg, out=cfg.out + "-unbroken"))
    from accelerate import Accelerator

    real = Accelerator.save_state
    saves = []

    def save_state(self, path):
        real(self, path)
        saves.append(path)
        if len(saves) == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", save_state)
        with pytest.raises(Killed):
            train(cfg)
    assert same(weights(unbroken), weights(train(cfg)))


def test_a_finished_run_is_left_alone(cfg, monkeypatch):
    best = train(cfg)
    before = best.stat().st_mtime_ns
    kill_at(monkeypatch, 0)
    assert train(cfg) == best
    assert best.stat().st_mtime_ns == before


def test_other_settings_in_the_same_folder_are_refused(cfg):
    train(replace(cfg, epochs=1))
    complaint = r"epochs was 1, is 3; lr was 0.001, is 0.1.*--out.*--pretrained .*last.safe"
    with pytest.raises(ValueError, match=complaint):
        train(replace(cfg, lr=0.1))
    train(replace(cfg, epochs=1, workers=1))  # how many processes read makes no difference


def test_broken_files_neither_stop_nor_hide(cfg, digits, tmp_path, caplog):
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    for split in ("train", "val"):
        victim = next((data / split / "grow").iterdir())
        victim.write_bytes(b"no video")
    best = train(replace(cfg, data=str(data), epochs=2, workers=1))
    history = json.loads((best.parent / "metrics.json").read_text())
    assert [row["unreadable"] for row in history] == [2, 2]
    unreadable = json.loads((best.parent / "unreadable.json").read_text())
    assert len(unreadable) == 2
    named = [r.message for r in caplog.records if "unreadable video" in r.message]
    assert len(named) == 2


def test_a_validation_of_nothing_readable_does_not_stop_the_run(cfg, digits, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    for video in data.glob("val/*/*.mp4"):
        video.write_bytes(b"no video")
    best = train(replace(cfg, data=str(data), epochs=1))
    (row,) = json.loads((best.parent / "metrics.json").read_text())
    assert row["val_top1"] is None
    assert row["unreadable"] == 8
    assert best.is_file()


def test_metrics_lost_to_a_kill_are_written_again(cfg):
    """Killed after the last checkpoint, before its row of metrics."""
    folder = train(cfg).parent
    whole = (folder / "metrics.json").read_text()
    (folder / "metrics.json").unlink()
    train(cfg)
    assert (folder / "metrics.json").read_text() == whole


def test_accumulated_batches_take_one_step(cfg):
    best = train(replace(cfg, epochs=1, batch_size=4, accumulate=2))
    history = json.loads((best.parent / "metrics.json").read_text())
    assert history[0]["step"] == 48 // 8


def test_gradient_checkpointing_changes_no_number(cfg):
    cfg = replace(cfg, epochs=1, overrides=TINY | {"drop_path_rate": 0.0})
    plain = train(cfg)
    other = train(replace(cfg, grad_checkpointing=(1, 1, 1, 1), out=cfg.out + "2"))
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(other)[key], value, rtol=1e-4, atol=1e-6)


def test_fine_tuning_starts_from_weights_with_a_fresh_head(cfg, tmp_path):
    first = train(replace(cfg, epochs=1))
    (tmp_path / "w.safetensors").write_bytes(first.read_bytes())
    again = replace(cfg, out=cfg.out + "2", epochs=1, lr=1e-9, fresh_head=True)
    second = train(replace(again, pretrained=str(tmp_path / "w.safetensors")))
    assert torch.allclose(
        weights(second)["patch_embed1.proj.weight"], weights(first)["patch_embed1.proj.weight"]
    )
    assert not torch.allclose(weights(second)["head.weight"], weights(first)["head.weight"])


def test_a_loss_that_is_no_number_ends_the_run(cfg):
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train(replace(cfg, lr=1e30, clip_grad=1e30))


@pytest.mark.parametrize("text", [None, "{", "[]"], ids=str)
def test_a_run_whose_settings_are_lost_is_not_overwritten(cfg, text):
    folder = train(replace(cfg, epochs=1)).parent
    (folder / "settings.json").unlink()
    if text is not None:
        (folder / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=r"settings\.json cannot be read"):
        train(replace(cfg, epochs=1))


@pytest.mark.parametrize("damaged", ["optimizer.bin", "random_states_0.pkl", "model.safetensors"])
def test_a_damaged_checkpoint_is_named(cfg, damaged):
    folder = train(replace(cfg, epochs=1)).parent
    (checkpoint,) = folder.glob("checkpoint-*")
    (checkpoint / damaged).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{checkpoint.name} is damaged .*delete that folder"):
        train(replace(cfg, epochs=1))
    (checkpoint / damaged).unlink()
    with pytest.raises(ValueError, match=rf"{checkpoint.name} is damaged .*delete that folder"):
        train(replace(cfg, epochs=1))


def test_best_weights_that_are_gone_are_missed(cfg):
    train(replace(cfg, epochs=1)).unlink()
    with pytest.raises(ValueError, match=r"best\.safetensors is gone"):
        train(replace(cfg, epochs=1))


def test_out_must_be_a_folder(cfg, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be the folder of a run"):
        train(replace(cfg, out=str(tmp_path / "file")))


def test_one_class_is_none_to_tell_apart(cfg, digits, tmp_path):
    shutil.copytree(digits / "train/grow", tmp_path / "data/grow")
    with pytest.raises(ValueError, match="holds one class only"):
        train(replace(cfg, data=str(tmp_path / "data")))


def test_sides_that_mirroring_would_swap_are_pointed_out(cfg, caplog):
    train(replace(cfg, epochs=1, augment=AugmentConfig(flip=0.5)))
    assert "may turn 'move left' into another class" in caplog.text


def test_the_network_of_an_own_checkpoint_is_taken_from_it(cfg, tmp_path):
    other = create_model("uniformer_nano", 8, **TINY, stages="LLLG")
    save_checkpoint(tmp_path / "w.safetensors", other)
    cfg = replace(
        cfg, epochs=1, model=None, overrides={}, pretrained=str(tmp_path / "w.safetensors")
    )
    assert load_model(train(cfg)).cfg == other.cfg


def test_a_name_with_a_tag_means_its_weights(cfg, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"uniformer_small_k400_16x4\.pth"):
        train(replace(cfg, model="uniformer_small.k400_16x4", overrides={}))


def test_the_time_left_is_told_once_it_shows_and_then_by_the_minute(monkeypatch):
    now = 0.0
    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    for once, want in ((False, [10, 70, 130]), (True, [10])):
        now, told = 0.0, []
        pace = module.Pace(300)
        for _ in range(150):
            now += 1.0
            if text := pace.step(once):
                told.append(now)
                assert tqdm.format_interval(300 - now) in text
        assert told == want


def test_lists_need_a_validation_list(cfg, tmp_path):
    (tmp_path / "train.csv").write_text("a.mp4,0\n")
    with pytest.raises(ValueError, match="give the other one with --val"):
        train(replace(cfg, data=str(tmp_path / "train.csv")))


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0}, {"warmup": 1.0}, {"batch_size": 0}, {"lr": 0.0}, {"clip_grad": 0.0},
        {"weight_decay": -1.0}, {"checkpoint_every": -1}, {"label_smoothing": 2.0},
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_refused(cfg, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        replace(cfg, **bad)


def test_two_processes_share_the_work(cfg, digits):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "uniformer",
        "train", f"--data={digits}", f"--out={cfg.out}", "--model=uniformer_nano",
        f"--overrides={json.dumps(TINY)}", "--input.frames=4", "--input.size=32", "--epochs=1",
        "--batch_size=4", "--workers=0",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    folder = module.RunFolder(cfg.out).path
    assert json.loads((folder / "fingerprint.json").read_text())["processes"] == 2
    (row,) = json.loads((folder / "metrics.json").read_text())
    assert row["step"] == 48 // 8  # 4 videos in each process
    assert load_model(folder / "best.safetensors").num_classes == 8


# --- Optimizer ------------------------------------------------------------------------


def test_decay_spares_norms_and_biases_but_not_the_dpe():
    """The groups of the official log: 30 + 154 parameters spared, 102 decayed."""
    model = create_model("uniformer_small")
    groups = make_optimizer(model, 1e-4, 0.05).param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.05, 102), (0.0, 184)]
    assert any(p is model.blocks1[0].pos_embed.weight for p in groups[0]["params"])


def test_learning_rate_rises_then_falls_along_a_cosine():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = cosine_with_warmup(optimizer, steps=110, warmup=10, floor=1e-2)
    rates = []
    for _ in range(111):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.01)
    assert rates[5] == pytest.approx(0.505)
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.505)
    assert rates[110] == pytest.approx(0.01)


def test_weights_of_other_colours_are_pointed_out(cfg, tmp_path, caplog):
    other = create_model(cfg.model, 8, **TINY)
    other.input = replace(cfg.input, bgr=True)
    save_checkpoint(tmp_path / "w.safetensors", other)
    train(replace(cfg, epochs=1, pretrained=str(tmp_path / "w.safetensors")))
    assert "trained with bgr=True, this run has False" in caplog.text
