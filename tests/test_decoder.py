"""The decoding process: exact, and replaced when it hangs or crashes."""

import os
import pickle
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.videos import write
from uniformer import decoder as decoder_module
from uniformer.decoder import Decoder
from uniformer.video import VideoDecodeError, open_video


@pytest.fixture
def video(tmp_path):
    return write(tmp_path / "v.mp4", frames=20)


@pytest.fixture
def decoder():
    with Decoder(timeout=30) as decoder:
        yield decoder


def test_frames_are_those_of_the_reader(video, decoder):
    want = open_video(video).read([0, 7, 7, 19])
    assert np.array_equal(decoder.read(video, [0, 7, 7, 19]), want)
    frames, info = decoder.clip(video, lambda n: [0, n - 1])
    assert np.array_equal(frames, want[[0, 3]])
    assert info == decoder.info(video) == decoder.check(video)
    frames += 1  # its own memory, writable


def test_failures_name_the_file_and_leave_the_decoder_usable(video, decoder, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    for path in (broken, tmp_path / "missing.mp4"):
        with pytest.raises(VideoDecodeError, match=path.name):
            decoder.clip(path, lambda n: [0])
    with pytest.raises(VideoDecodeError, match="it has 20 frames, number 20 was asked for"):
        decoder.read(video, [20])
    with pytest.raises(ValueError, match="0 or above"):
        decoder.read(video, [-1])
    assert decoder.info(video).frames == 20


def test_a_video_shorter_than_promised_is_sampled_again(video, decoder, tmp_path):
    asked = []

    def choose(n):
        asked.append(n)
        return [0, n - 1]

    class Short(Decoder):
        def info(self, path):
            return super().info(path).__class__(30, 25.0, "decord")

    with Short(timeout=30) as short:
        frames, info = short.clip(video, choose)
    assert asked == [30, 20]
    assert info.frames == 20
    assert "fewer frames decode" in info.note
    assert np.array_equal(frames, decoder.read(video, [0, 19]))


def test_a_hanging_file_costs_its_time_limit_and_no_more(video, tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    os.mkfifo(folder / "00001.jpg")  # opening it waits for ever
    with Decoder(timeout=1) as decoder:
        started = time.monotonic()
        with pytest.raises(VideoDecodeError, match="stopped after 1 s"):
            decoder.read(folder, [0])
        assert time.monotonic() - started < 20
        assert decoder.info(video).frames == 20


def test_a_loop_that_holds_the_interpreter_is_ended(video, monkeypatch):
    """As a stuck native decoder does: no other Python thread of the child can run."""
    stuck = "import re, uniformer.decoder as d; d.open_video = "
    stuck += "lambda *_: re.match('(a+)+$', 'a' * 60 + 'b'); from uniformer"
    program = decoder_module.CHILD.replace("from uniformer", stuck)
    monkeypatch.setattr(decoder_module, "CHILD", program)
    with Decoder(timeout=1) as decoder, pytest.raises(VideoDecodeError, match="stopped after 1 s"):
        decoder.info(video)


def test_a_crash_is_a_failure_of_that_file_alone(video, decoder):
    decoder.info(video)
    os.kill(decoder._child.pid, signal.SIGSEGV)
    with pytest.raises(VideoDecodeError, match="crashed"):
        decoder.info(video)
    assert decoder.info(video).frames == 20


def test_it_survives_fork_and_pickle(video, decoder):
    """decord itself hangs when a reader crosses a fork."""
    want = decoder.read(video, [3])
    assert np.array_equal(pickle.loads(pickle.dumps(decoder)).read(video, [3]), want)

    class Reads(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            return decoder.read(video, [i])

    loader = torch.utils.data.DataLoader(
        Reads(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    assert np.array_equal(np.stack(list(loader))[3], want)


def test_it_leaves_no_process_behind(video):
    decoder = Decoder()
    decoder.info(video)
    child = decoder._child
    decoder.close()
    assert child.poll() is not None
    decoder.close()  # again is fine
    assert decoder.info(video).frames == 20
    child = decoder._child
    del decoder
    assert child.poll() is not None


@pytest.mark.parametrize(
    "bad", [{"decoder": "opencv"}, {"timeout": 0}, {"timeout": float("inf")}], ids=str
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Decoder(**bad)


def test_threads_take_turns(video, decoder, tmp_path):
    other = write(tmp_path / "other.mp4", frames=30, height=32, width=64)
    want = {path: decoder.read(path, [3, 19]) for path in (video, other)}
    with ThreadPoolExecutor(2) as pool:
        paths = [video, other] * 10
        read = pool.map(lambda p: decoder.read(p, [3, 19]), paths)
        for path, frames in zip(paths, read, strict=True):
            assert np.array_equal(frames, want[path])


def test_an_interrupted_question_does_not_answer_the_next(video, decoder, tmp_path, monkeypatch):
    other = write(tmp_path / "other.mp4", frames=30, height=32, width=64)
    want = decoder.read(video, [5])

    def interrupted(pipe):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decoder_module, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decoder.read(other, [5])
    assert np.array_equal(decoder.read(video, [5]), want)


def test_a_file_that_was_replaced_is_read_anew(decoder, tmp_path):
    path = write(tmp_path / "v.mp4", frames=30)
    assert decoder.info(path).frames == 30
    write(path, frames=12)
    assert decoder.info(path).frames == 12
