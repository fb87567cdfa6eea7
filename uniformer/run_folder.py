"""The folder of a training run: settings, checkpoints and metrics, each written whole or not."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["RunFolder"]

PREFIX, PARTIAL = "checkpoint-", ".partial-"


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
            f"{self.path} holds a run whose settings cannot be read from {path} ({error}): restore "
            f"that file, or give another folder with --out"
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
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            for old in sorted(self._checkpoints(), key=_step_of)[:-keep]:
                shutil.rmtree(old)
        wait()

    def _checkpoints(self) -> list[Path]:
        return [p for p in self.path.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))
