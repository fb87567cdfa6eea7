import pytest
import torch

from uniformer import InputConfig
from uniformer.transforms import AugmentConfig, make_views, train_clip

PLAIN = InputConfig(frames=2, size=32, mean=(0, 0, 0), std=(1, 1, 1))


def ramp(T, H, W):
    """Frames whose red grows along W, green along H, blue with time."""
    frames = torch.zeros(T, H, W, 3)
    frames[..., 0] = torch.linspace(0, 255, W)
    frames[..., 1] = torch.linspace(0, 255, H)[:, None]
    frames[..., 2] = torch.linspace(0, 255, T)[:, None, None]
    return frames.round().byte()


# Wide, tall and square; a long side that scaling does not make whole.
@pytest.mark.parametrize(("H", "W"), [(32, 64), (90, 45), (32, 32), (50, 73)], ids=str)
@pytest.mark.parametrize("crops", [1, 3])
def make_views_are_square_crops_along_the_long_side(H, W, crops):
    views = make_views(ramp(4, H, W), PLAIN, clips=2, crops=crops)
    assert views.shape == (2 * crops, 3, 2, 32, 32)
    assert views.is_contiguous()
    red, green = views[:, 0, 0, 16, :], views[:, 1, 0, :, 16]
    long = red if W > H else green
    if crops == 3 and H != W:
        assert long[0].min() < 0.02  # one end, the middle, the other end
        assert abs(float(long[1].mean()) - 0.5) < 0.02
        assert long[2].max() > 0.98
        assert torch.equal(views[3, :2], views[0, :2])  # clip after clip, crops within
    elif crops == 1:
        assert abs(float(long[0].mean()) - 0.5) < 0.02


def test_the_middle_crop_starts_where_the_official_one_does():
    """33 pixels leave 1: it is rounded up, as the official code rounds."""
    frames = ramp(2, 32, 33)
    view = make_views(frames, PLAIN, 1, 1)
    assert torch.equal(view[0, :, 0], frames[0, :, 1:].permute(2, 0, 1).float() / 255)


def test_normalisation_and_channel_order():
    frames = torch.full((2, 32, 32, 3), 255, dtype=torch.uint8)
    frames[..., 2] = 0
    cfg = InputConfig(frames=2, size=32, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    assert make_views(frames, cfg, 1, 1)[0, :, 0, 0, 0].tolist() == [1.0, 3.0, 0.0]
    bgr = InputConfig(frames=2, size=32, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0), bgr=True)
    assert make_views(frames, bgr, 1, 1)[0, :, 0, 0, 0].tolist() == [0.0, 3.0, 1.0]


def test_only_1_and_3_crops():
    with pytest.raises(ValueError, match="crops must be 1 or 3"):
        make_views(ramp(2, 32, 32), PLAIN, 1, 2)


def test_training_crops_are_the_same_in_every_frame_and_hang_on_the_seed():
    frames = ramp(1, 40, 60).expand(4, -1, -1, -1)
    cfg = InputConfig(frames=4, size=32)
    augment = AugmentConfig(color_jitter=0.3)
    first, again, other = (train_clip(frames, cfg, augment, seed) for seed in (1, 1, 2))
    assert first.shape == (1, 3, 4, 32, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.testing.assert_close(first, first[:, :, :1].expand_as(first))


def test_augmentation_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    train_clip(ramp(2, 40, 60), PLAIN, AugmentConfig(), 3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_mirroring_is_as_likely_as_asked(flip):
    for seed in range(8):
        red = train_clip(ramp(2, 40, 60), PLAIN, AugmentConfig(flip=flip), seed)[0, 0, 0, 16]
        assert (red[-1] < red[0]) == bool(flip)


def test_crops_take_the_share_of_the_area_they_are_asked_for():
    whole = train_clip(ramp(2, 60, 60), PLAIN, AugmentConfig((1.0, 1.0), (1.0, 1.0), 0.0), 0)
    assert whole[0, 0, 0, 16].max() - whole[0, 0, 0, 16].min() > 0.95
    augment = AugmentConfig((0.04, 0.04), (1.0, 1.0), 0.0)  # a fifth of each side
    part = train_clip(ramp(2, 60, 60), PLAIN, augment, 0)
    assert 0.1 < part[0, 0, 0, 16].max() - part[0, 0, 0, 16].min() < 0.25


@pytest.mark.parametrize("bad", [{"scale": (0.5, 0.2)}, {"ratio": (0, 1)}, {"flip": 2}], ids=str)
def test_bad_augmentation_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AugmentConfig(**bad)


@pytest.mark.parametrize("bad", [
    {"frames": 0}, {"stride": 0}, {"sampling": "random"}, {"size": 16}, {"std": (0, 1, 1)},
], ids=str)  # fmt: skip
def test_bad_input_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        InputConfig(**bad)


def test_large_frames_are_first_reduced_to_the_scale_of_the_official_data():
    """A fine checkerboard is grey at 320 pixels; sampled as it is, it would turn into a pattern."""
    board = (torch.arange(480)[:, None] + torch.arange(640)[None]) % 2 * 255
    frames = board.byte()[None, :, :, None].expand(2, -1, -1, 3)
    view = make_views(frames, InputConfig(frames=2, size=64, mean=(0, 0, 0), std=(1, 1, 1)), 1, 1)
    assert view.shape == (1, 3, 2, 64, 64)
    assert (view - 0.5).abs().max() < 0.02
