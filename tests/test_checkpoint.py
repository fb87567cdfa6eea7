"""Every official container, inflation, and errors that say what is wrong."""

import argparse
import os
import pickle
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tests.reference_values import golden, value
from uniformer import CheckpointError, InputConfig, UniFormer, UniFormerConfig, create_model
from uniformer.checkpoint import inflate_weight, load_weights, read_checkpoint, save_checkpoint
from uniformer.configs import PRESETS

TINY = UniFormerConfig((1, 1, 1, 1), (8, 8, 16, 16), head_dim=8, num_classes=4)


@pytest.fixture
def model():
    return UniFormer(TINY)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- Containers -----------------------------------------------------------------------


CONTAINERS = {
    "flat": lambda sd: sd,
    "model": lambda sd: {"model": sd, "epoch": 3},
    "model_state": lambda sd: {
        "epoch": 3, "model_state": sd, "optimizer_state": {"lr": 0.1}, "cfg": "TRAIN:\n  ENABLE: 1",
    },
    "state_dict": lambda sd: {"state_dict": sd},
    "module.": lambda sd: {"model": OrderedDict((f"module.{k}", v) for k, v in sd.items())},
    "compiled": lambda sd: {f"_orig_mod.module.{k}": v for k, v in sd.items()},
    "image training": lambda sd: {"model": sd, "args": argparse.Namespace(lr=1e-3), "epoch": 299},
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pth", ".pyth"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_official_containers_load_as_they_are(tmp_path, model, container, suffix):
    path = tmp_path / f"weights{suffix}"
    torch.save(CONTAINERS[container](model.state_dict()), path)
    checkpoint = read_checkpoint(path)
    if container == "compiled":
        checkpoint.weights = {k.removeprefix("module."): v for k, v in checkpoint.weights.items()}
    assert equal(checkpoint.weights, model.state_dict())
    assert checkpoint.model is checkpoint.input is checkpoint.classes is None
    other = UniFormer(TINY)
    load_weights(other, checkpoint.weights)
    assert equal(other.state_dict(), model.state_dict())


def test_the_old_pickle_format_loads(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert equal(read_checkpoint(tmp_path / "w.pth").weights, model.state_dict())


def test_plain_safetensors_load(tmp_path, model):
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    checkpoint = read_checkpoint(tmp_path / "w.safetensors")
    assert equal(checkpoint.weights, model.state_dict())
    assert checkpoint.model is None


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"model": Attack()}, tmp_path / "evil.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Attack(), protocol=2))
    for name in ("evil.pth", "bare.pth"):
        with pytest.raises(CheckpointError, match="would run code"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("damage", ["empty", "text", "half"])
def test_damaged_files_are_named(tmp_path, model, name, damage):
    path = tmp_path / name
    save_checkpoint(path, model) if path.suffix == ".safetensors" else torch.save(
        model.state_dict(), path
    )
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"not found", "half": whole[: len(whole) // 2]}[damage])
    with pytest.raises(CheckpointError, match=f"{name}.*damaged"):
        read_checkpoint(path)


def test_missing_files_and_files_without_weights_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "missing.pth")
    for content in ({"epoch": 3, "loss": 0.1}, [1, 2], torch.zeros(3)):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match="holds no state_dict"):
            read_checkpoint(tmp_path / "w.pth")


# --- What does not fit ----------------------------------------------------------------


def test_misfits_are_listed_and_change_nothing(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = UniFormer(TINY).state_dict()
    del weights["blocks1.0.conv1.weight"]
    weights["blocks9.0.bias"] = torch.zeros(3)
    weights["norm.weight"] = torch.zeros(5)
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, weights, source="w.pth")
    assert caught.value.missing == ["blocks1.0.conv1.weight"]
    assert caught.value.unexpected == ["blocks9.0.bias"]
    assert caught.value.mismatched == ["norm.weight (5,) instead of (16,)"]
    for part in ("w.pth", "1 missing", "1 unexpected", "1 of another shape", "norm.weight (5,)"):
        assert part in str(caught.value)
    assert equal(model.state_dict(), before)


def test_a_fresh_head_must_be_asked_for(model):
    weights = UniFormer(replace(TINY, num_classes=9)).state_dict()
    with pytest.raises(CheckpointError, match="fresh_head=True"):
        load_weights(model, weights)
    head = model.head.weight.clone()
    load_weights(model, weights, fresh_head=True)
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.norm.weight, weights["norm.weight"])
    del weights["head.weight"], weights["head.bias"]
    load_weights(model, weights, fresh_head=True)


def test_the_port_with_other_labels_is_recognised(model):
    weights = {f"backbone.{k}": v for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="mmaction2"):
        load_weights(model, weights)


def test_half_precision_weights_load_into_a_float_model(model):
    weights = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    load_weights(model, weights)
    assert model.head.weight.dtype == torch.float32


# --- Inflation ------------------------------------------------------------------------


def test_image_weights_inflate_as_in_the_official_code():
    images = {k: value(k, tuple(s)).float() for k, s in golden("image_keys")["image_small"].items()}
    model = UniFormer(PRESETS["uniformer_small"])
    load_weights(model, images, fresh_head=True)
    state = model.state_dict()
    for key, want in golden("inflate_small").items():
        assert list(state[key].shape) == want["shape"], key
        total, squares = state[key].double().sum(), state[key].double().square().sum()
        assert float(total) == pytest.approx(want["sum"], rel=1e-9, abs=1e-9), key
        assert float(squares) == pytest.approx(want["sumsq"], rel=1e-9), key


@pytest.mark.parametrize("how", ["average", "center"])
def test_an_inflated_kernel_answers_a_still_clip_as_the_image(how):
    weight, image = torch.randn(4, 3, 3, 3), torch.randn(1, 3, 8, 8)
    inflated = inflate_weight(weight, 5, how)
    assert inflated.shape == (4, 3, 5, 3, 3)
    still = image.unsqueeze(2).expand(-1, -1, 5, -1, -1)
    clip = torch.nn.functional.conv3d(still, inflated).squeeze(2)
    torch.testing.assert_close(clip, torch.nn.functional.conv2d(image, weight))


def test_center_inflation_uses_one_frame(model):
    image = {k: v.sum(2) if v.ndim == 5 else v for k, v in model.state_dict().items()}
    load_weights(model, image, inflate="center")
    affinity = model.blocks1[0].attn.weight
    assert (affinity[:, :, [0, 1, 3, 4]] == 0).all()
    assert torch.equal(affinity[:, :, 2], image["blocks1.0.attn.weight"])
    with pytest.raises(ValueError, match="'average' or 'center'"):
        load_weights(model, image, inflate="middle")


# --- Our own --------------------------------------------------------------------------


def test_our_checkpoints_explain_themselves(tmp_path, model):
    model.input = InputConfig(frames=8, stride=2, size=64, bgr=True)
    model.classes = ["a", "b", "c", "ü"]
    save_checkpoint(tmp_path / "deep/w.safetensors", model)
    checkpoint = read_checkpoint(tmp_path / "deep/w.safetensors")
    assert equal(checkpoint.weights, model.state_dict())
    assert checkpoint.model == model.cfg
    assert checkpoint.input == model.input
    assert checkpoint.classes == model.classes
    assert os.listdir(tmp_path / "deep") == ["w.safetensors"]


def test_a_reset_classifier_is_what_is_saved(tmp_path, model):
    model.reset_classifier(7)
    save_checkpoint(tmp_path / "w.safetensors", model)
    assert read_checkpoint(tmp_path / "w.safetensors").model.num_classes == 7


def test_only_safetensors_are_written(tmp_path, model):
    with pytest.raises(ValueError, match="must end in"):
        save_checkpoint(tmp_path / "w.pth", model)


def test_a_checkpoint_of_a_newer_version_is_said_to_be_one(tmp_path, model, monkeypatch):
    save_checkpoint(tmp_path / "w.safetensors", model)
    import uniformer.checkpoint as module

    known = {"depths", "dims"}
    monkeypatch.setattr(
        module,
        "fields",
        lambda cls: [f for f in cls.__dataclass_fields__.values() if f.name in known],
    )
    with pytest.raises(CheckpointError, match="newer version"):
        read_checkpoint(tmp_path / "w.safetensors")


@pytest.mark.parametrize("header", [
    "not json", "null", "[]", "3", '"x"', "{}", '{"model": null}', '{"model": [1]}',
    '{"model": {"depths": 3}}', '{"model": {"head_dim": "32"}}', '{"model": {"head_dim": 0}}',
    '{"model": {}, "input": [1]}', '{"model": {}, "input": {"frames": "4"}}',
    '{"model": {}, "classes": ["a"]}', '{"model": {}, "classes": 7}',
    '{"model": {"num_classes": 4}, "classes": "abcd"}',
], ids=str)  # fmt: skip
def test_headers_that_make_no_sense_are_damage(header, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"uniformer": header})
    with pytest.raises(CheckpointError, match=r"w\.safetensors"):
        read_checkpoint(path)


def test_containers_are_told_apart_by_content(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "w.pth")
    torch.save({"a": torch.ones(1)}, tmp_path / "w.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("w.pth", "w.safetensors", "old.pt"):
        assert torch.equal(read_checkpoint(tmp_path / name).weights["a"], torch.ones(1))


def test_prefixes_come_off_in_any_order(tmp_path):
    torch.save({"_orig_mod.module.a": torch.ones(1)}, tmp_path / "w.pth")
    assert list(read_checkpoint(tmp_path / "w.pth").weights) == ["a"]


@pytest.mark.parametrize(
    "odd", [[1.0], torch.ones(8, dtype=torch.complex64), torch.ones(8, device="meta")], ids=str
)
def test_weights_that_are_no_dense_real_tensors_are_refused(odd):
    model = create_model("uniformer_nano", 8)
    with pytest.raises(CheckpointError, match=r"dense real tensors; head\.bias is none"):
        load_weights(model, model.state_dict() | {"head.bias": odd})
