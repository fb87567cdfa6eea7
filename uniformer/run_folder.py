"""The folder of a training run: settings, checkpoints and metrics, each written whole or not."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["RunFolder"]

PREFIX, PARTIAL = "checkpoint-", ".partial-"
FILES = "files.json"  # in a checkpoint: the size of each other file of it


class RunFolder:
    """Where a run keeps what it must not lose.

    Args:
        path: the folder; made when something is written.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)

    def last_checkpoint(self) -> Path | None:
        """The checkpoint with the most steps, or None."""
        return max(self._checkpoints(), key=_step_of, default=None)

    def check(self, files: dict[str, dict[str, Any]], free: tuple[str, ...]) -> None:
        """Refuse to go on with a run under other settings.

        Args:
            files: what `write_json` would now write into each.
            free: names of the settings that may differ.

        Raises:
            ValueError: no folder can be here; or a checkpoint is here, and other settings differ,
                which it names, or cannot be read.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be the folder of a run: {error}") from error
        if self.last_checkpoint() is None:
            return
        changed = []
        for name, now in files.items():
            before = self._read_json(name)
            changed += [
                f"{k} was {before.get(k)!r}, is {now.get(k)!r}"
                for k in sorted(before.keys() | now.keys())
                if before.get(k) != now.get(k) and k not in free
            ]
        if changed:
            raise ValueError(
                f"{self.path} holds a run with other settings: {'; '.join(changed)}. Give the same "
                f"to go on with it, or another folder with --out, there with --pretrained "
                f"{self.path / 'last.safetensors'} to start from its weights"
            )

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            content = json.loads(path.read_text())
            if isinstance(content, dict):
                return content
            error = "it holds no settings"
        except (OSError, ValueError) as reason:
            error = str(reason)
        raise ValueError(
            f"{self.path} holds a run, but {path} cannot be read ({error}): restore that file, or "
            f"give another folder with --out"
        )

    def write_json(self, name: str, content: Any) -> None:
        """Write `content` to the file `name`."""
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.path / f"{PARTIAL}{name}"
        partial.write_text(json.dumps(content, indent=1))
        os.replace(partial, self.path / name)

    def save_checkpoint(
        self, step: int, save: Callable[[str], Any], keep: int, main: bool, wait: Callable[[], Any]
    ) -> None:
        """Let `save` write a checkpoint, then give it its name and drop the oldest ones.

        Args:
            step: what to call it by.
            save: writes into a folder it is given; called in every process.
            keep: how many checkpoints remain.
            main: whether this is the process that names and drops.
            wait: returns once every process has come to it.
        """
        partial, final = self.path / f"{PARTIAL}{step}", self.path / f"{PREFIX}{step}"
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        wait()
        save(str(partial))
        wait()
        if main:
            sizes = {p.name: p.stat().st_size for p in partial.iterdir()}
            (partial / FILES).write_text(json.dumps(sizes))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            for old in sorted(self._checkpoints(), key=_step_of)[:-keep]:
                shutil.rmtree(old)
        wait()

    def check_files(self, checkpoint: Path) -> None:
        """See that a checkpoint is as it was written.

        Raises:
            ValueError: a file is missing, or has another size.
        """
        sizes = self._read_json(f"{checkpoint.name}/{FILES}")
        for name, size in sizes.items():
            path = checkpoint / name
            if not path.is_file() or path.stat().st_size != size:
                raise ValueError(
                    f"{checkpoint} is damaged ({name} is not as it was written): delete that "
                    f"folder to go on from the checkpoint before, or give another --out"
                )

    def _checkpoints(self) -> list[Path]:
        return [p for p in self.path.glob(f"{PREFIX}*") if re.fullmatch("[0-9]+", _number(p))]


def _number(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix(PREFIX)


def _step_of(checkpoint: Path) -> int:
    return int(_number(checkpoint))
