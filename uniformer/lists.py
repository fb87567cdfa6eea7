"""Which videos there are, and what class each shows.

Read are: a folder with a folder of videos for each class; Kinetics-style lists of `path,label`;
Something-Something lists of `folder frames label`; and Something-Something V2's JSON files.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uniformer.video import IMAGES

log = logging.getLogger(__name__)

__all__ = ["Sample", "VideoList", "read_labels", "read_videos", "videos_in"]

VIDEOS = (
    ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv",
)  # fmt: skip
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "test"),
    "test": ("test", "val", "validation", "valid"),
}
HELD_OUT = 5  # without a split of its own, every fifth video of a class is held out


@dataclass(frozen=True)
class Sample:
    """One video.

    Attributes:
        path: a file, or a folder of frames.
        label: index of its class.
    """

    path: str
    label: int


@dataclass(frozen=True)
class VideoList:
    """Videos and their classes.

    Attributes:
        samples: the videos.
        classes: names in the order of the labels, where they are known.
        held_out: the split was drawn from class folders that have none of their own.
    """

    samples: list[Sample]
    classes: list[str] | None
    held_out: bool = False

    @property
    def num_classes(self) -> int:
        return len(self.classes) if self.classes else 1 + max(s.label for s in self.samples)


def read_videos(
    data: str | os.PathLike,
    split: str,
    root: str | os.PathLike | None = None,
    classes: Sequence[str] | None = None,
) -> VideoList:
    """Read a list of videos, whatever its form.

    Args:
        data: a folder of class folders (itself, or under train/, val/ and test/), or a list: .csv
            or .txt of `path,label`, `path label` or `folder frames label`, or .json of
            Something-Something V2 with labels.json beside it.
        split: which part of a folder is meant, "train", "val" or "test". Of class folders without
            such parts every fifth video is "val" and the others "train"; "test" is all of them.
        root: where a list's relative paths start; its own folder unless given.
        classes: names in the order of the labels, as a checkpoint knows them; class folders and
            named labels are put in this order.

    Returns:
        The videos; files are not opened.

    Raises:
        ValueError: nothing there, or not understood; the text says where.
    """
    path = Path(data)
    if path.is_dir():
        return _read_folder(path, split, classes)
    if not path.is_file():
        raise ValueError(f"{path} is neither a folder of videos nor a list of them")
    base = Path(root) if root else path.parent
    if path.suffix == ".json":
        return _read_json(path, base, classes)
    return _read_lines(path, base, classes)


def read_labels(path: str | os.PathLike) -> list[str]:
    """Read the names of classes, in the order of their indices.

    Args:
        path: text, one name a line, perhaps followed by a tab or comma and its index; or JSON, a
            list, or an object from index to name or from name to index.

    Returns:
        The names.

    Raises:
        ValueError: not understood, or the indices are not 0, 1, 2 and so on.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the labels cannot be read from {path}: {error}") from error
    if path.suffix == ".json":
        pairs = _json_pairs(path, text)
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        split = [re.fullmatch(r"(.+?)\s*[\t,]\s*(\d+)", line) for line in lines]
        if lines and all(split):
            pairs = [(int(m[2]), m[1]) for m in split if m]
        else:
            pairs = list(enumerate(lines))
    pairs.sort()
    if not pairs or [i for i, _ in pairs] != list(range(len(pairs))):
        raise ValueError(
            f"{path} must name the classes 0, 1, 2 and so on, each once; found "
            f"{len(pairs)} names, indices {[i for i, _ in pairs][:5]}..."
        )
    return [name for _, name in pairs]


def _json_pairs(path: Path, text: str) -> list[tuple[int, str]]:
    try:
        content = json.loads(text)
        if isinstance(content, list):
            return list(enumerate(map(str, content)))
        if all(re.fullmatch(r"\d+", k) for k in content):
            return [(int(k), str(v)) for k, v in content.items()]
        return [(int(v), k) for k, v in content.items()]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no names of classes: {error}") from error


# --- A folder of class folders --------------------------------------------------------


def _read_folder(path: Path, split: str, classes: Sequence[str] | None) -> VideoList:
    base = next((path / name for name in SPLITS[split] if (path / name).is_dir()), None)
    whole = base is None and not any(
        (path / name).is_dir() for names in SPLITS.values() for name in names
    )
    base = path if whole else base
    held_out = whole and split != "test"
    if base is None:
        raise ValueError(f"{path} has no folder {' or '.join(SPLITS[split])} of videos")
    folders = sorted(p for p in base.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = {p.name: videos_in(p) for p in folders}
    if not any(found.values()):
        loose = sum(p.name.lower().endswith(VIDEOS) for p in base.iterdir())
        raise ValueError(
            f"{base} must hold a folder for each class with its videos ({', '.join(VIDEOS)}); "
            f"found: {len(folders)} folders, no video in any, {loose} videos beside them"
        )
    if empty := [name for name, videos in found.items() if not videos]:
        log.warning("%s: no videos in the class folders %s", base, ", ".join(empty))
    if whole and split == "test":
        log.info(
            "%s has no test folder: all %d of its videos are tested, those that a training on it "
            "learned from included; --split val is the fifth that it held out",
            path, sum(map(len, found.values())),
        )  # fmt: skip
    names = list(classes) if classes is not None else list(found)
    samples = []
    for name, videos in found.items():
        label = _index_of(name, names, f"the folder {base / name}")
        if held_out:
            kept = set(_every_fifth(videos))
            videos = [v for v in videos if (v in kept) == (split == "val")]
        samples += [Sample(v, label) for v in videos]
    return VideoList(samples, names, held_out)


def videos_in(folder: Path) -> list[str]:
    """Video files at any depth; a folder that holds images is one video."""
    found = []
    for at, folders, files in os.walk(folder):
        folders.sort()
        found += [os.path.join(at, f) for f in sorted(files) if f.lower().endswith(VIDEOS)]
        if at != str(folder) and any(f.lower().endswith(IMAGES) for f in files):
            found.append(at)
    return found


def _every_fifth(videos: list[str]) -> list[str]:
    """Held-out videos of a class: at least one of two, the same on every machine."""
    names = sorted(videos, key=lambda v: hashlib.sha256(os.path.basename(v).encode()).hexdigest())
    return names[: max(len(names) // HELD_OUT, 1)] if len(names) > 1 else []


def _index_of(name: str, classes: Sequence[str], what: str) -> int:
    for candidate in (name, name.replace("_", " ")):
        if candidate in classes:
            return list(classes).index(candidate)
    raise ValueError(
        f"{what} is none of the {len(classes)} known classes "
        f"({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''}): "
        f"name it as they are named, or give other labels"
    )


# --- Lists ----------------------------------------------------------------------------


def _read_lines(path: Path, base: Path, classes: Sequence[str] | None) -> VideoList:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no list of videos: it is not text") from error
    numbered = [(i, line) for i, line in enumerate(lines, start=1) if line]
    if not numbered:
        raise ValueError(f"{path} is empty")
    framed = all(re.fullmatch(r"\S+\s+\d+\s+\d+", line) for _, line in numbered)
    samples = []
    for i, line in numbered:
        if framed:  # folder, number of frames, label
            name, _, label = line.split()
        else:
            match = re.fullmatch(r"(.+?)\s*,\s*([^,]+)", line) or re.fullmatch(
                r"(.+)\s+(\S+)", line
            )
            if match is None:
                raise ValueError(
                    f"{path}, line {i}: it must be 'path,label', 'path label' or 'folder frames "
                    f"label', got {line!r}"
                )
            name, label = match[1], match[2]
        samples.append(Sample(os.path.join(base, name), _label(label, classes, path, i)))
    return VideoList(samples, list(classes) if classes is not None else None)


def _label(text: str, classes: Sequence[str] | None, path: Path, line: int) -> int:
    where = f"{path}, line {line}"
    if not text.isdecimal():
        if classes is None:
            raise ValueError(
                f"{where}: the label must be a whole number, got {text!r}; for names, give the "
                f"file of labels too, and leave out a header"
            )
        return _index_of(text, classes, f"{where}: {text!r}")
    label = int(text)
    if classes is not None and label >= len(classes):
        raise ValueError(f"{where}: label {label} is too large, there are {len(classes)} classes")
    return label


def _read_json(path: Path, base: Path, classes: Sequence[str] | None) -> VideoList:
    """Something-Something V2: videos are `id`.webm, classes are templates without brackets."""
    if classes is None:
        beside = sorted(path.parent.glob("*labels.json"))
        if not beside:
            raise ValueError(f"the classes of {path} must be in a labels.json beside it")
        classes = read_labels(beside[0])
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        pairs = [(str(e["id"]), re.sub(r"[\[\]]", "", e["template"])) for e in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} must be a list of objects with 'id' and 'template': {error!r}"
        ) from error
    index = {re.sub(r"[\[\]]", "", name): i for i, name in enumerate(classes)}
    if unknown := sorted({t for _, t in pairs} - set(index)):
        raise ValueError(f"{path} has classes that its labels lack: {', '.join(unknown[:3])}")
    samples = []
    for name, template in pairs:
        file = base / f"{name}.webm"
        samples.append(
            Sample(str(file if not (base / name).is_dir() else base / name), index[template])
        )
    return VideoList(samples, list(classes))
