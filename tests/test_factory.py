"""Models by name, and released weights by tag."""

import hashlib
import sys
from dataclasses import replace

import pytest
import torch

import uniformer
from uniformer import CheckpointError, create_model, list_models, list_pretrained, load_model
from uniformer.configs import PRESETS, InputConfig
from uniformer.factory import open_model
from uniformer.pretrained import ZOO, find_weights, kinetics400_classes

NANO = "uniformer_nano"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where released files are looked for."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.fixture
def released(cache, monkeypatch):
    """A released checkpoint of the nano model, lying in the cache."""
    weights = replace(
        ZOO["uniformer_small.k400_16x8"], model=NANO, hub=None, sha256=None, tag="k400_16x8"
    )
    monkeypatch.setitem(ZOO, weights.name, weights)
    monkeypatch.setattr(type(weights), "head_dim", 32)
    model = create_model(NANO)
    torch.save(model.state_dict(), cache / weights.file)
    return weights, model


# --- Presets --------------------------------------------------------------------------


def test_names():
    assert list_models("*small*") == ["uniformer_small"]
    assert {"uniformer_small", "uniformer_base"} <= set(list_models())
    assert "uniformer_small.k400_16x4" in list_pretrained("*small.k400*")
    assert uniformer.create_model is create_model
    assert "create_model" in dir(uniformer)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        uniformer.nothing  # noqa: B018


def test_parameters_of_the_paper():
    with torch.device("meta"):
        for name, want in (("uniformer_small", 21_400_400), ("uniformer_base", 49_813_200)):
            assert sum(p.numel() for p in create_model(name).parameters()) == want


def test_overrides_reach_the_network():
    model = create_model(
        NANO, num_classes=7, drop_path_rate=0.4, stages="LGGG", tube_size=3, dpe=False, std=True
    )
    assert model.head.out_features == 7
    assert model.blocks4[-1].drop_path.rate == pytest.approx(0.4)
    assert model.cfg == replace(
        PRESETS[NANO],
        num_classes=7, drop_path_rate=0.4, stages="LGGG", tube_size=3, dpe=False, std=True,
    )  # fmt: skip
    assert create_model(NANO).num_classes == 400


@pytest.mark.parametrize(("arguments", "complaint"), [
    ((["resnet"], {}), "no model is named 'resnet'"),
    (([NANO], {"depth": 3}), "no such setting: depth"),
    (([NANO], {"pretrained": True}), "needs a tag in the name"),
    ((["uniformer_small.k400_16x4"], {}), "pass pretrained=True with it"),
    (([NANO], {"pretrained": "k400_16x4"}), "uniformer_nano has none"),
    ((["uniformer_small"], {"pretrained": "k400"}), "no released checkpoint is named 'k400'"),
    ((["uniformer_small"], {"pretrained": "uniformer_base.k400_16x4"}), "not of uniformer_small"),
    ((["uniformer_small"], {"pretrained": "uniformer_xxs.k400_16_160"}), "prune tokens"),
    (([NANO], {"pretrained": "missing.pth"}), "no such checkpoint"),
], ids=lambda a: a if isinstance(a, str) else "")  # fmt: skip
def test_mistakes_are_explained(arguments, complaint):
    positional, named = arguments
    with pytest.raises(ValueError, match=complaint):
        create_model(*positional, **named)


# --- Weights --------------------------------------------------------------------------


def test_released_weights_by_tag_in_every_spelling(released):
    weights, model = released
    for made in (
        create_model(weights.name, pretrained=True),
        create_model(NANO, pretrained="k400_16x8"),
        create_model(NANO, pretrained=weights.name),
        open_model(weights.name),
    ):
        assert torch.equal(made.head.weight, model.head.weight)
        assert made.input == InputConfig(frames=16, stride=8)
        assert made.classes[0] == "riding a bike"
        assert len(made.classes) == 400


def test_a_fresh_head_has_no_class_names(released):
    weights, model = released
    made = create_model(weights.name, num_classes=3, pretrained=True, fresh_head=True)
    assert made.head.out_features == 3
    assert made.classes is None
    assert torch.equal(made.norm.weight, model.norm.weight)
    with pytest.raises(CheckpointError, match="fresh_head=True"):
        create_model(weights.name, num_classes=3, pretrained=True)


def test_another_head_dim_of_equal_shapes_is_refused(released):
    """The known trap: the weights load, and the model answers nonsense."""
    weights, _ = released
    with pytest.raises(CheckpointError, match="head_dim=32, not 16"):
        create_model(weights.name, pretrained=True, head_dim=16)


def test_our_own_files_guard_the_architecture_too(tmp_path):
    path = tmp_path / "w.safetensors"
    uniformer.save_checkpoint(path, create_model(NANO, num_classes=3, head_dim=16))
    with pytest.raises(CheckpointError, match="head_dim=16, not 32"):
        create_model(NANO, pretrained=path)
    model = load_model(path)
    assert (model.cfg.head_dim, model.num_classes) == (16, 3)
    assert create_model(NANO, pretrained=path, head_dim=16, drop_path_rate=0.5).num_classes == 3


def test_bare_weights_need_a_model(tmp_path):
    torch.save(create_model(NANO, 3).state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds weights only: name the network"):
        load_model(tmp_path / "w.pth")
    assert open_model(str(tmp_path / "w.pth"), NANO).num_classes == 3
    with pytest.raises(CheckpointError, match="neither a file nor the name"):
        open_model("uniformer_small.k700")


# --- Where files come from ------------------------------------------------------------


def test_the_zoo_is_whole():
    assert len(ZOO) == 39
    small = find_weights("uniformer_small", "k400_16x4")
    assert (small.file, small.clips, small.crops) == ("uniformer_small_k400_16x4.pth", 4, 1)
    assert small.input == InputConfig()
    ssv2 = find_weights("uniformer_base", "sthv2_32_prek600")
    assert ssv2.input == InputConfig(frames=32, stride=1, sampling="uniform", bgr=True)
    assert (ssv2.num_classes, ssv2.classes) == (174, None)
    assert all(w.drive or w.name == "uniformer_small.k400_32x4" for w in ZOO.values())


def test_kinetics_400_is_in_the_official_order():
    classes = kinetics400_classes()
    assert len(set(classes)) == 400
    assert [classes[i] for i in (0, 1, 2, 399)] == [
        "riding a bike", "marching", "dodgeball", "playing badminton",
    ]  # fmt: skip
    listing = "".join(f"{name}\t{i}\n" for i, name in enumerate(classes))
    assert len(listing) == 7446  # of the official kinetics_400_categroies.txt
    assert hashlib.sha256(listing.encode()).hexdigest()[:8] == "90355263"


def test_a_file_with_another_sha256_is_refused(cache):
    (cache / "uniformer_small_k400_16x4.pth").write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="its sha256 must be 4829a6ab"):
        create_model("uniformer_small", pretrained="k400_16x4")


@pytest.mark.parametrize(("tag", "complaint"), [
    ("k400_16x4", r"Google Drive only: download https://drive.google.com/file/d/1-jGZI"),
    ("k400_32x4", "no weights"),
])  # fmt: skip
def test_what_cannot_be_fetched_is_said_with_where_to_put_it(cache, tag, complaint):
    with pytest.raises(CheckpointError, match=complaint) as caught:
        create_model("uniformer_small", pretrained=tag)
    if tag == "k400_16x4":
        assert str(cache / "uniformer_small_k400_16x4.pth") in str(caught.value)


def test_the_hub_is_asked_and_its_failure_explained(cache, monkeypatch):
    asked = []

    def offline(*arguments):
        asked.append(arguments)
        raise OSError("no network")

    hub = type(sys)("huggingface_hub")
    hub.hf_hub_download = offline
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(CheckpointError, match=r"OSError: no network.*Without network: download"):
        create_model("uniformer_small", pretrained="k400_16x8")
    assert asked == [("Sense-X/uniformer_video", "uniformer_small_k400_16x8.pth")]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install 'uniformer\[hub\]'"):
        create_model("uniformer_small", pretrained="k400_16x8")


def test_the_hub_s_file_is_used(cache, monkeypatch, released):
    weights, model = released
    path = cache / weights.file
    elsewhere = path.rename(cache.parent / "from_hub.pth")
    monkeypatch.setitem(ZOO, weights.name, replace(weights, hub="somebody/something"))
    hub = type(sys)("huggingface_hub")
    hub.hf_hub_download = lambda repo, file: str(elsewhere)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    made = create_model(weights.name, pretrained=True)
    assert torch.equal(made.head.weight, model.head.weight)
