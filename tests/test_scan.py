import json
import os

import pytest

from tests.videos import write
from uniformer.decoder import Decoder
from uniformer.lists import read_videos
from uniformer.scan import ScanConfig, drop_unreadable, scan


@pytest.fixture
def folder(tmp_path):
    base = tmp_path / "v"
    for name, codec in (
        ("run/a.mp4", "libx264"),
        ("run/b.avi", "mpeg4"),
        ("jump/c.webm", "libvpx-vp9"),
    ):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        write(base / name, codec, 12, {"b": "1M"})
    (base / "jump/broken.mp4").write_bytes((base / "run/a.mp4").read_bytes()[:900])
    return base


def rows_of(path):
    return {os.path.basename(r["path"]): r for r in map(json.loads, path.read_text().splitlines())}


def test_every_file_is_in_the_manifest(folder, tmp_path, capsys):
    manifest = tmp_path / "deep/manifest.jsonl"
    scan(ScanConfig(str(folder), manifest=str(manifest)))
    rows = rows_of(manifest)
    assert rows["a.mp4"] | {"mtime": 0, "path": "", "bytes": 0} == {
        "path": "", "bytes": 0, "mtime": 0, "error": None, "frames": 12, "fps": 25.0,
        "reader": "decord", "note": None,
    }  # fmt: skip
    assert rows["b.avi"]["reader"] == "pyav"
    assert "broken.mp4" in rows["broken.mp4"]["error"]
    printed = capsys.readouterr().out
    assert "4 videos, 3 readable, 1 not" in printed
    assert "1 videos: seeking in avi is not exact" in printed


def test_a_second_scan_looks_at_what_changed(folder, tmp_path, monkeypatch):
    cfg = ScanConfig(str(folder), manifest=str(tmp_path / "m.jsonl"), workers=1)
    scan(cfg)
    write(folder / "jump/broken.mp4", frames=5)
    looked = []
    real = Decoder.check
    monkeypatch.setattr(Decoder, "check", lambda self, p: looked.append(p) or real(self, p))
    scan(cfg)
    assert [os.path.basename(p) for p in looked] == ["broken.mp4"]
    assert rows_of(tmp_path / "m.jsonl")["broken.mp4"]["frames"] == 5


def test_training_lists_leave_out_what_cannot_be_read(folder, tmp_path):
    manifest = str(tmp_path / "m.jsonl")
    scan(ScanConfig(str(folder), manifest=manifest))
    videos, left_out = drop_unreadable(read_videos(folder, "test"), manifest)
    assert left_out == 1
    assert [os.path.basename(s.path) for s in videos.samples] == ["c.webm", "a.mp4", "b.avi"]
    assert videos.classes == ["jump", "run"]


def test_lists_are_scanned_too(folder, tmp_path):
    (tmp_path / "list.csv").write_text("run/a.mp4,0\nrun/gone.mp4,0\n")
    rows = scan(ScanConfig(str(tmp_path / "list.csv"), str(folder), str(tmp_path / "m.jsonl")))
    assert [bool(r["error"]) for r in rows] == [False, True]


def test_bad_manifests_and_empty_folders_are_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there are no videos"):
        scan(ScanConfig(str(tmp_path / "empty")))
    (tmp_path / "m.jsonl").write_text("not json\n")
    for bad, complaint in (("m.jsonl", "is not a manifest"), ("gone.jsonl", "no such manifest")):
        with pytest.raises(ValueError, match=complaint):
            drop_unreadable(read_videos(folder, "test"), tmp_path / bad)
