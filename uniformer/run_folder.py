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

    def check_settings(self, settings: dict[str, Any], free: tuple[str, ...]) -> None:
        """Refuse to go on with a run under other settings.

        Args:
            settings: those of now, as JSON has them.
            free: names of those that may differ.

        Raises:
            ValueError: a checkpoint is here, and other settings differ; it names them.
        """
        if self.last_checkpoint() is None:
            return
        before = json.loads((self.path / "settings.json").read_text())
        changed = [
            f"{k} was {before.get(k)!r}, is {settings.get(k)!r}"
            for k in sorted(before.keys() | settings.keys())
            if before.get(k) != settings.get(k) and k not in free
        ]
        if changed:
            raise ValueError(
                f"{self.path} holds a run with other settings: {'; '.join(changed)}. Give the same "
                f"to go on with it, or another folder with --out"
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
