"""Lists of videos in every form they come in."""

import json

import pytest

from uniformer.lists import Sample, read_labels, read_videos


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(videos, folder):
    return [(str(s.path).removeprefix(f"{folder}/"), s.label) for s in videos.samples]


# --- Folders --------------------------------------------------------------------------


def test_folders_under_train_and_val(tmp_path):
    touch(
        tmp_path, "train/run/a.mp4", "train/jump/b.AVI", "train/jump/deep/c.webm", "val/run/d.mp4"
    )
    touch(tmp_path, "train/jump/notes.txt", "train/.cache/x.mp4")
    train = read_videos(tmp_path, "train")
    assert train.classes == ["jump", "run"]
    assert not train.held_out
    assert names(train, tmp_path) == [
        ("train/jump/b.AVI", 0), ("train/jump/deep/c.webm", 0), ("train/run/a.mp4", 1),
    ]  # fmt: skip
    val = read_videos(tmp_path, "val", classes=train.classes)
    assert names(val, tmp_path) == [("val/run/d.mp4", 1)]
    assert read_videos(tmp_path, "test").samples == read_videos(tmp_path, "val").samples


def test_a_fifth_is_held_out_where_there_are_no_splits(tmp_path):
    touch(tmp_path, *[f"{c}/{i}.mp4" for c in ("run", "jump") for i in range(10)], "once/x.mp4")
    train, val = read_videos(tmp_path, "train"), read_videos(tmp_path, "val")
    assert train.held_out
    assert val.held_out
    assert len(train.samples) == 17
    assert len(val.samples) == 4
    whole = read_videos(tmp_path, "test")
    assert not whole.held_out
    assert set(whole.samples) == set(train.samples) | set(val.samples)
    assert read_videos(tmp_path, "val") == val


def test_two_videos_of_a_class_are_one_for_each_split(tmp_path):
    touch(tmp_path, "run/a.mp4", "run/b.mp4")
    assert len(read_videos(tmp_path, "train").samples) == 1
    assert len(read_videos(tmp_path, "val").samples) == 1


def test_a_folder_of_frames_is_one_video(tmp_path):
    touch(tmp_path, "val/run/clip1/1.jpg", "val/run/clip1/2.jpg", "val/run/x.mp4")
    assert names(read_videos(tmp_path, "val"), tmp_path) == [
        ("val/run/x.mp4", 0), ("val/run/clip1", 0),
    ]  # fmt: skip


def test_folders_are_put_in_the_order_of_the_classes_known(tmp_path):
    """Kinetics is not alphabetical in the official weights."""
    touch(tmp_path, "val/abseiling/a.mp4", "val/riding_a_bike/b.mp4")
    order = ["riding a bike", "marching", "abseiling"]
    videos = read_videos(tmp_path, "val", classes=order)
    assert names(videos, tmp_path) == [("val/abseiling/a.mp4", 2), ("val/riding_a_bike/b.mp4", 0)]
    assert videos.classes == order
    with pytest.raises(ValueError, match="abseiling is none of the 1 known classes"):
        read_videos(tmp_path, "val", classes=["riding a bike"])


@pytest.mark.parametrize(("made", "split", "complaint"), [
    (["train/run/a.mp4"], "val", "no folder val or validation"),
    (["run/notes.txt"], "train", "no video in any"),
    (["a.mp4"], "train", "1 videos beside them"),
], ids=str)  # fmt: skip
def test_folders_without_videos_are_refused(tmp_path, made, split, complaint):
    touch(tmp_path, *made)
    with pytest.raises(ValueError, match=complaint):
        read_videos(tmp_path, split)


# --- Lists ----------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "want"), [
    ("a.mp4,3\nb c.mp4,0\n", [("a.mp4", 3), ("b c.mp4", 0)]),
    ("a.mp4, 3\r\nx,y.mp4,1\r\n\r\n", [("a.mp4", 3), ("x,y.mp4", 1)]),  # Kinetics: CRLF
    ("v/a.avi 3\nv/b c.avi 0\n", [("v/a.avi", 3), ("v/b c.avi", 0)]),  # UCF101
    ("\ufeffa.mp4\t3", [("a.mp4", 3)]),
    ("100218 42 134\n48032 36 0\n", [("100218", 134), ("48032", 0)]),  # Something-Something
], ids=["comma", "CRLF", "space", "BOM and tab", "folder frames label"])  # fmt: skip
def test_lists_of_lines(tmp_path, text, want):
    path = tmp_path / "list.csv"
    path.write_bytes(text.encode())
    videos = read_videos(path, "train")
    assert names(videos, tmp_path) == want
    assert videos.classes is None
    assert videos.num_classes == 1 + max(label for _, label in want)


def test_paths_start_at_the_root(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("a.mp4,0\n/data/b.mp4,1\n")
    videos = read_videos(path, "train", root="/videos")
    assert videos.samples == [Sample("/videos/a.mp4", 0), Sample("/data/b.mp4", 1)]


def test_named_labels(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("a.mp4,jump\nb.mp4,1\n")
    assert [s.label for s in read_videos(path, "train", classes=["run", "jump"]).samples] == [1, 1]
    with pytest.raises(ValueError, match="line 1: the label must be a whole number, got 'jump'"):
        read_videos(path, "train")


@pytest.mark.parametrize(("text", "complaint"), [
    ("", "is empty"),
    ("a.mp4,0\nno label\n", "line 2"),
    ("lonely.mp4\n", "line 1: it must be"),
    ("a.mp4,7\n", "label 7 is too large, there are 2 classes"),
    ("a.mp4,swim\n", "none of the 2 known classes"),
    ("a.mp4,-1\n", "none of the 2 known classes"),
], ids=["empty", "later line", "one field", "too large", "unknown name", "negative"])  # fmt: skip
def test_bad_lists_are_refused(tmp_path, text, complaint):
    path = tmp_path / "list.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read_videos(path, "train", classes=["run", "jump"])


def test_nothing_there_is_said():
    with pytest.raises(ValueError, match="neither a folder of videos nor a list"):
        read_videos("/nowhere", "train")


def test_something_something_v2(tmp_path):
    entries = [
        {"id": "74225", "label": "spinning cube", "template": "Spinning [something]"},
        {"id": "116154", "label": "x", "template": "Attaching [something] to [something]"},
    ]
    (tmp_path / "validation.json").write_text(json.dumps(entries))
    (tmp_path / "frames/116154").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"labels\.json beside it"):
        read_videos(tmp_path / "validation.json", "val")
    labels = {"Attaching something to something": "0", "Spinning something": "1"}
    (tmp_path / "something-something-v2-labels.json").write_text(json.dumps(labels))
    videos = read_videos(tmp_path / "validation.json", "val", root=tmp_path / "frames")
    assert names(videos, tmp_path) == [("frames/74225.webm", 1), ("frames/116154", 0)]
    assert videos.classes == list(labels)
    (tmp_path / "test.json").write_text(json.dumps([{"id": "1"}]))
    with pytest.raises(ValueError, match="'id' and 'template'"):
        read_videos(tmp_path / "test.json", "test")


# --- Labels ---------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "text"), [
    ("plain.txt", "riding a bike\nmarching\n"),
    ("official.txt", "marching\t1\nriding a bike\t0\n"),
    ("comma.csv", "riding a bike,0\nmarching,1\n"),
    ("list.json", '["riding a bike", "marching"]'),
    ("by_index.json", '{"1": "marching", "0": "riding a bike"}'),
    ("by_name.json", '{"riding a bike": 0, "marching": "1"}'),
])  # fmt: skip
def test_labels_in_every_form(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    assert read_labels(path) == ["riding a bike", "marching"]


@pytest.mark.parametrize(("name", "text"), [
    ("empty.txt", ""), ("gap.txt", "a\t0\nb\t2\n"), ("twice.json", '{"a": 0, "b": 0}'),
    ("broken.json", "{"), ("nested.json", '{"a": {"b": 1}}'), ("number.json", "3"),
])  # fmt: skip
def test_bad_labels_are_refused(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=name):
        read_labels(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_labels(tmp_path / "missing.txt")
