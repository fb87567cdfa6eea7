import pytest
import torch
from PIL import Image

from tests.videos import write
from uniformer import InputConfig, create_model, save_checkpoint
from uniformer.predict import PredictConfig, contact_sheet, predict, predict_video
from uniformer.video import VideoDecodeError

CLASSES = ["run", "jump", "swim"]


@pytest.fixture
def model():
    model = create_model("uniformer_nano", 3, depths=(1, 1, 1, 1), dims=(8, 8, 32, 32))
    model.input = InputConfig(frames=4, stride=2, size=32)
    return model


@pytest.fixture
def checkpoint(model, tmp_path):
    model.classes = CLASSES
    save_checkpoint(tmp_path / "w.safetensors", model)
    return str(tmp_path / "w.safetensors")


@pytest.fixture
def video(tmp_path):
    return str(write(tmp_path / "v.mp4"))


def test_probabilities_are_of_all_classes_and_sorted(model, video):
    prediction = predict_video(model, video, top=5, clips=2, crops=3)
    assert sorted(prediction.classes) == ["class 0", "class 1", "class 2"]
    assert sum(prediction.probabilities) == pytest.approx(1)
    assert prediction.probabilities == sorted(prediction.probabilities, reverse=True)
    assert prediction.views.shape == (6, 3, 4, 32, 32)
    with torch.no_grad():
        want = model.eval()(prediction.views).mean(0).softmax(0).max()
    assert prediction.probabilities[0] == pytest.approx(float(want), rel=1e-4)


def test_the_command_prints_names(checkpoint, video, tmp_path, capsys):
    sheet = tmp_path / "deep/sheet.png"
    predict(PredictConfig([video, video], checkpoint, top=2, sheet=str(sheet)))
    printed = capsys.readouterr().out
    assert printed.count(video) == 2
    assert printed.count("%") == 4
    assert any(name in printed for name in CLASSES)
    with Image.open(sheet) as image:
        assert image.format == "PNG"
        assert image.width > image.height > 200


def test_without_names_it_prints_indices_and_says_so(model, video, tmp_path, capsys):
    save_checkpoint(tmp_path / "bare.safetensors", model)
    predict(PredictConfig([video], str(tmp_path / "bare.safetensors")))
    printed = capsys.readouterr().out
    assert "names of the classes are not known" in printed
    assert "--labels" in printed
    assert "class 0" in printed


def test_labels_from_a_file(checkpoint, video, tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("uno\ndue\ntre\n")
    predict(PredictConfig([video], checkpoint, labels=str(tmp_path / "labels.txt")))
    assert "uno" in capsys.readouterr().out
    (tmp_path / "labels.txt").write_text("uno\ndue\n")
    with pytest.raises(ValueError, match="names 2 classes, the model has 3"):
        predict(PredictConfig([video], checkpoint, labels=str(tmp_path / "labels.txt")))


def test_an_unreadable_video_does_not_stop_the_others(checkpoint, video, capsys):
    with pytest.raises(VideoDecodeError, match=r"1 of 2 .*\n  missing\.mp4: no such file"):
        predict(PredictConfig(["missing.mp4", video], checkpoint))
    assert video in capsys.readouterr().out


def test_a_folder_of_videos_is_predicted_video_by_video(checkpoint, video, tmp_path):
    assert [p.path for p in predict(PredictConfig([str(tmp_path)], checkpoint))] == [video]


def test_predicting_in_the_midst_of_training_leaves_the_mode(model, video):
    assert predict_video(model.train(), video).classes
    assert model.training
    assert predict_video(model.bfloat16(), video).classes


@pytest.mark.parametrize("bad", [{"top": 0}, {"clips": 0}, {"crops": 2}], ids=str)
def test_impossible_predictions_are_refused(model, video, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        predict_video(model, video, **bad)


def test_a_backbone_predicts_nothing(model, video):
    model.reset_classifier(0)
    with pytest.raises(ValueError, match="there must be classes to name"):
        predict_video(model, video)


@pytest.mark.parametrize("bgr", [False, True])
def test_the_sheet_shows_the_frames_the_model_saw(model, video, tmp_path, bgr):
    """Its pixels are the video's, whatever the normalisation."""
    model.input = InputConfig(frames=4, stride=2, size=64, bgr=bgr)
    prediction = predict_video(model, video)
    contact_sheet([prediction], tmp_path / "sheet.png", model.input, truth=["swim"])
    with Image.open(tmp_path / "sheet.png") as sheet:
        one_view = sheet.height
        frame = sheet.crop((4, 24, 4 + 112, 24 + 112)).resize((64, 64))
    red = max(frame.get_flattened_data(), key=lambda p: p[0] - p[2])
    assert red[0] > 120 > red[2]  # the block that moves is red
    many = predict_video(model, video, clips=2, crops=3)
    contact_sheet([many], tmp_path / "many.png", model.input)
    with Image.open(tmp_path / "many.png") as sheet:
        assert sheet.height > 5 * one_view
