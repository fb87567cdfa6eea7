"""Reading videos in a process that may hang or crash.

A decoder that hangs holds the interpreter's lock, and one that crashes takes its process along, so
no time limit within the process helps. Here the decoding process is a child, which ends itself
when a file takes too long, and is replaced.
"""

import contextlib
import faulthandler
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from threading import Lock
from typing import IO, Any

import numpy as np

from uniformer.video import (
    DECODERS,
    SEEKING,
    Reader,
    VideoDecodeError,
    VideoInfo,
    VideoTooShort,
    error_text,
    forward,
    open_video,
)

__all__ = ["Decoder"]

MAX_TIMEOUT = 86400.0  # seconds; far larger ones overflow in the child

# Linux's usual 64 KiB cost 9 ms more for a clip of 16 x 256 x 340 pixels; ignored elsewhere.
PIPE_BYTES = 1 << 20

# The child finds this package where the parent found it, installed or not.
CHILD = "import sys; sys.path = {path!r}; from uniformer.decoder import serve; serve({args})"


class Decoder:
    """Reads videos in a child process that is replaced when it hangs or crashes.

    Safe to hold across fork and to pickle: every process starts a child of its own when it first
    reads. Threads may share one, and take turns.

    Args:
        decoder: see `open_video`.
        timeout: seconds that opening or reading one file may take.

    Raises:
        ValueError: `decoder` is unknown, or `timeout` is not above 0 and at most a day.
    """

    def __init__(self, decoder: str = "decord", timeout: float = 60.0) -> None:
        if decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
        if not 0 < timeout <= MAX_TIMEOUT:
            raise ValueError(f"timeout must be above 0 and at most a day in seconds, got {timeout}")
        self.decoder = decoder
        self.timeout = timeout
        self._child: subprocess.Popen | None = None
        self._owner = 0
        self._lock = Lock()

    def info(self, path: str | os.PathLike) -> VideoInfo:
        """Open a video.

        Raises:
            VideoDecodeError: it cannot be opened.
        """
        return self._ask("info", path)[1]

    def check(self, path: str | os.PathLike) -> VideoInfo:
        """Open a video and decode all of it; `frames` is how many there really are.

        Raises:
            VideoDecodeError: it cannot be opened, or not be read to its end.
        """
        return self._ask("check", path)[1]

    def read(self, path: str | os.PathLike, indices: Sequence[int]) -> np.ndarray:
        """Frames (n, H, W, 3), uint8 RGB, at `indices`.

        Raises:
            VideoDecodeError: they cannot be read, or there are fewer frames.
        """
        frames, info = self._ask("read", path, indices)
        if frames is None:
            raise VideoDecodeError(
                f"{path}: it has {info.frames} frames, number {max(indices)} was asked for"
            )
        return frames

    def clip(
        self, path: str | os.PathLike, choose: Callable[[int], Sequence[int]]
    ) -> tuple[np.ndarray, VideoInfo]:
        """Read the frames that `choose` picks, given how many there are.

        A file may end before its packets say so; then `choose` is asked again.

        Returns:
            Frames (n, H, W, 3), uint8 RGB, and what is known of the video.

        Raises:
            VideoDecodeError: the video cannot be opened or read.
        """
        frames, info = self._ask("read", path, choose(self.info(path).frames))
        if frames is None:
            if info.frames == 0:
                raise VideoDecodeError(f"{path}: {info.note}")
            frames = self.read(path, choose(info.frames))
        return frames, info

    def close(self) -> None:
        """End the child process; the next read starts another."""
        child, self._child = self._child, None
        if child is not None and self._owner == os.getpid():
            child.kill()
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(OSError, ValueError):  # half a request may be left in it
                    if pipe is not None:
                        pipe.close()
            child.wait()

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_child", None) is not None:
            self.close()

    def __getstate__(self) -> dict:
        return {"decoder": self.decoder, "timeout": self.timeout}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _ask(
        self, task: str, path: str | os.PathLike, indices: Sequence[int] = ()
    ) -> tuple[np.ndarray | None, VideoInfo]:
        """The child's answer: frames, None where the video is too short for them, and its info."""
        wanted = [int(i) for i in indices]
        if task == "read" and (not wanted or min(wanted) < 0):
            raise ValueError(f"indices must be one or more, each 0 or above, got {wanted}")
        if self._owner != os.getpid():  # after a fork another thread may have held the lock
            self._lock = Lock()
        with self._lock:
            return self._exchange(task, os.fsdecode(path), wanted)

    def _exchange(
        self, task: str, path: str, wanted: list[int]
    ) -> tuple[np.ndarray | None, VideoInfo]:
        if self._child is None or self._owner != os.getpid():
            self._start()
        child = self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            _send(child.stdin, (task, path, wanted))
            answer, frames = _receive(child.stdout)
        except (EOFError, OSError):
            self.close()
            raise VideoDecodeError(
                f"{path}: its decoder crashed, or was stopped after {self.timeout:g} s"
            ) from None
        except BaseException:  # Ctrl-C: an answer left in the pipe would be taken for the next one
            self.close()
            raise
        if isinstance(answer, VideoDecodeError):
            raise answer
        return frames, answer

    def _start(self) -> None:
        program = CHILD.format(path=sys.path, args=f"{self.decoder!r}, {self.timeout!r}")
        self._child = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # FFmpeg's chatter, a thousand lines for one damaged file
            pipesize=PIPE_BYTES,
        )
        self._owner = os.getpid()


# --- The child ------------------------------------------------------------------------


def serve(decoder: str, timeout: float) -> None:
    """Answer requests until the pipe closes, or end when one takes too long."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not write into the answers
    video = _OpenVideo(decoder)
    while True:
        try:
            (task, path, indices), _ = _receive(sys.stdin.buffer)
        except EOFError:
            return
        # Its thread needs no lock of the interpreter's, so it ends even a stuck native loop.
        faulthandler.dump_traceback_later(timeout, exit=True)
        frames: np.ndarray | None = None
        answer: VideoInfo | VideoDecodeError
        try:
            frames, answer = getattr(video, task)(path, indices)
        except Exception as error:
            video = _OpenVideo(decoder)
            known = isinstance(error, VideoDecodeError) and str(error).startswith(path)
            answer = VideoDecodeError(str(error) if known else f"{path}: {error_text(error)}")
        faulthandler.cancel_dump_traceback_later()
        _send(answers, answer, frames)


class _OpenVideo:
    """The video that was asked for last, open; its methods are the tasks of the child."""

    def __init__(self, decoder: str) -> None:
        self.decoder = decoder
        self.file: tuple | None = None  # path, and what shows that another file came in its place
        self.reader: Reader

    def info(self, path: str, _: list[int]) -> tuple[None, VideoInfo]:
        stat = os.stat(path) if os.path.exists(path) else None
        file = (path, stat and (stat.st_mtime_ns, stat.st_size))
        if file != self.file:
            self.reader = open_video(path, self.decoder)
            self.file = file
        return None, self.reader.info

    def read(self, path: str, indices: list[int]) -> tuple[np.ndarray | None, VideoInfo]:
        self.info(path, [])
        try:
            return self._read(path, indices), self.reader.info
        except VideoTooShort as short:
            return None, short.info

    def check(self, path: str, _: list[int]) -> tuple[None, VideoInfo]:
        self.info(path, [])
        frames = self.reader.count()
        if frames != self.reader.info.frames:
            return None, VideoTooShort(self.reader.info, frames).info
        self.read(path, [0, frames // 2, frames - 1])
        return None, self.reader.info

    def _read(self, path: str, indices: list[int]) -> np.ndarray:
        try:
            return self.reader.read(indices)
        except (VideoTooShort, VideoDecodeError):
            raise
        except Exception:
            info = self.reader.info
            if info.reader not in SEEKING:
                raise
            self.reader = forward(path, info, f"{info.reader} cannot read it")
            return self.reader.read(indices)


# --- Messages -------------------------------------------------------------------------


def _send(pipe: IO[bytes], message: object, frames: np.ndarray | None = None) -> None:
    """A message, then the bytes of `frames`: pickling them would copy them twice."""
    data = pickle.dumps((message, None if frames is None else frames.shape))
    pipe.write(struct.pack("<Q", len(data)))
    pipe.write(data)
    if frames is not None:
        pipe.write(np.ascontiguousarray(frames).data.cast("B"))
    pipe.flush()


def _receive(pipe: IO[bytes]) -> tuple[Any, np.ndarray | None]:
    (size,) = struct.unpack("<Q", _exactly(pipe, 8))
    message, shape = pickle.loads(_exactly(pipe, size))
    if shape is None:
        return message, None
    frames = np.empty(shape, np.uint8)
    if pipe.readinto(frames.data.cast("B")) < frames.nbytes:  # type: ignore[attr-defined]
        raise EOFError
    return message, frames


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data
