"""Look at every video before a training does: which cannot be read, and which are read slowly."""

import json
import logging
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import local
from typing import Any

from tqdm import tqdm

from uniformer.decoder import Decoder
from uniformer.lists import VideoList, read_videos, videos_in
from uniformer.video import VideoDecodeError

__all__ = ["ScanConfig", "drop_unreadable", "scan"]

log = logging.getLogger(__name__)


@dataclass
class ScanConfig:
    """Settings of `uniformer scan`.

    Attributes:
        data: a folder, searched at any depth, or a list of videos.
        root: where the paths of a list start.
        manifest: file to write, a line of JSON for each video; lines of an earlier scan are kept
            for files that have not changed since.
        timeout: seconds that one file may take.
        workers: files at a time; one a core unless given.
        decoder: "decord", "torchcodec" or "pyav".
    """

    data: str
    root: str | None = None
    manifest: str = "manifest.jsonl"
    timeout: float = 60.0
    workers: int | None = None
    decoder: str = "decord"


def scan(cfg: ScanConfig) -> list[dict[str, Any]]:
    """Decode every video to its end, in child processes, and write what was found.

    Returns:
        A row for each video: path, bytes, mtime, error (None if it can be read), and for a
        readable one frames, fps, reader and note.

    Raises:
        ValueError: no videos there.
    """
    if Path(cfg.data).is_dir():
        paths = videos_in(Path(cfg.data))
    else:
        paths = [s.path for s in read_videos(cfg.data, "train", cfg.root).samples]
    paths = [os.path.abspath(p) for p in paths]
    if not paths:
        raise ValueError(f"there are no videos in {cfg.data}")
    manifest = Path(cfg.manifest)
    known = {row["path"]: row for row in _read_manifest(manifest)} if manifest.is_file() else {}
    kept = local()  # a decoder for each thread

    def look(path: str) -> dict[str, Any]:
        stamp = _stamp(path)
        row = known.get(path)
        if row is not None and {k: row[k] for k in stamp} == stamp:
            return row
        if not hasattr(kept, "decoder"):
            kept.decoder = Decoder(cfg.decoder, cfg.timeout)
        try:
            return stamp | {"error": None} | asdict(kept.decoder.check(path))
        except VideoDecodeError as error:
            return stamp | {"error": str(error)}

    manifest.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    partial = manifest.with_name(f".partial-{manifest.name}")
    with partial.open("w") as file, ThreadPoolExecutor(cfg.workers or os.cpu_count()) as pool:
        for row in tqdm(pool.map(look, paths), "scan", len(paths), unit="video", disable=None):
            file.write(json.dumps(row) + "\n")
            rows.append(row)
    os.replace(partial, manifest)
    print(_summary(rows))
    print(f"written to {manifest}")
    return rows


def drop_unreadable(videos: VideoList, manifest: str | os.PathLike) -> tuple[VideoList, int]:
    """Leave out the videos that a scan could not read.

    Returns:
        The others, and how many were left out.

    Raises:
        ValueError: the manifest is not there or is none.
    """
    rows = {row["path"]: row["error"] for row in _read_manifest(Path(manifest))}
    paths = [os.path.abspath(s.path) for s in videos.samples]
    if unknown := sum(path not in rows for path in paths):
        log.warning("%d of %d videos are not in %s: scan again", unknown, len(paths), manifest)
    samples = [s for s, p in zip(videos.samples, paths, strict=True) if not rows.get(p)]
    return replace(videos, samples=samples), len(paths) - len(samples)


def _stamp(path: str) -> dict[str, Any]:
    try:
        stat = os.stat(path)
    except OSError:
        return {"path": path, "bytes": None, "mtime": None}
    return {"path": path, "bytes": stat.st_size, "mtime": stat.st_mtime}


def _read_manifest(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [row for row in rows if row["path"] and (row["error"] or row["frames"])]
    except FileNotFoundError as error:
        raise ValueError(f"no such manifest: {path}; uniformer scan writes one") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a manifest of uniformer scan: {error!r}") from error


def _summary(rows: list[dict[str, Any]]) -> str:
    bad = [row["error"] for row in rows if row["error"]]
    lines = [f"{len(rows)} videos, {len(rows) - len(bad)} readable, {len(bad)} not"]
    lines += [f"  {reason}" for reason in bad]
    notes = Counter(row["note"] for row in rows if row.get("note"))
    lines += [f"{count} videos: {note}" for note, count in notes.most_common()]
    return "\n".join(lines)
