"""The `uniformer` command. Every setting is a flag, and a key of a YAML file for `--config`."""

import importlib
import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from uniformer.doctor import check_backend
from uniformer.video import VideoDecodeError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["main"]


class Command(NamedTuple):
    """A function of the same name in `module`, its settings, and the one that needs no flag."""

    module: str
    settings: str
    text: str
    positional: str | None = None
    nargs: str | None = None


COMMANDS = {
    "demo": Command("demo", "DemoConfig", "train on moving digits, test and predict"),
    "train": Command("train", "TrainConfig", "train on your videos"),
    "test": Command("evaluate", "TestConfig", "test a checkpoint on a list of videos"),
    "predict": Command("predict", "PredictConfig", "say what a video shows", "videos", "+"),
    "scan": Command("scan", "ScanConfig", "find videos that cannot be read", "data"),
    "info": Command("info", "InfoConfig", "parameters and multiply-adds", "name", "?"),
    "doctor": Command("doctor", "DoctorConfig", "which kernels run here, and why"),
}


class _Console(logging.Handler):
    """Lines that do not break a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a mistake in its use ends it with a sentence, not a traceback."""
    try:
        from jsonargparse import ArgumentParser
    except ImportError:
        sys.exit("the command line needs more packages: pip install 'uniformer[train]'")
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(
        prog="uniformer", description="UniFormer for video.", version=version("uniformer")
    )
    commands = parser.add_subcommands(required=True, dest="command")
    for name, command in COMMANDS.items():
        # The other commands' modules, and the libraries they import, stay unloaded.
        subparser = _parser_of(name, command) if argv[:1] == [name] else ArgumentParser()
        commands.add_subcommand(name, subparser, help=command.text)
    parsed = parser.parse_args(argv)

    logger = logging.getLogger("uniformer")
    logger.setLevel(logging.INFO)
    logger.handlers = [_Console()]
    command = COMMANDS[parsed.command]
    home = importlib.import_module(f"uniformer.{command.module}")
    settings, run = getattr(home, command.settings), getattr(home, parsed.command)
    try:
        if parsed.command != "doctor":
            check_backend()
        values = vars(parser.instantiate(parsed)[parsed.command])
        run(settings(**{f.name: values[f.name] for f in fields(settings)}))
        sys.stdout.flush()
    except BrokenPipeError:  # as in `uniformer info --zoo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, FloatingPointError, VideoDecodeError) as error:
        sys.exit(f"uniformer {parsed.command}: {_sentence(error)}")
    except KeyboardInterrupt:
        if parsed.command == "train":
            print("stopped: the same command goes on from the last checkpoint", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)  # at once: no waiting for workers that were interrupted midway


def _sentence(error: Exception) -> str:
    """What an error says, without the traceback that a DataLoader's worker wraps it in."""
    text = str(error)
    if "Original Traceback" not in text:
        return text
    raised = re.split(r"^[\w.]+(?:Error|Exception): ", text, flags=re.MULTILINE)
    return raised[-1].strip()


def _parser_of(name: str, command: Command) -> "ArgumentParser":
    from docstring_parser import parse
    from jsonargparse import ActionYesNo, ArgumentParser

    try:
        home = importlib.import_module(f"uniformer.{command.module}")
    except ImportError as error:
        sys.exit(f"uniformer {name} needs more packages ({error}): pip install 'uniformer[train]'")
    settings = getattr(home, command.settings)
    about = {p.arg_name: p.description for p in parse(settings.__doc__).params}
    switches = {f.name for f in fields(settings) if f.type is bool}
    parser = ArgumentParser(description=getattr(home, name).__doc__.partition("\n")[0])
    parser.add_argument(
        "--config", action="config", help="YAML or JSON file of settings; flags after it win"
    )
    if command.positional:
        name, text = command.positional, about[command.positional]
        parser.add_argument(name, type=str, nargs=command.nargs, help=text)
    for switch in sorted(switches):
        action = ActionYesNo(no_prefix="no_")
        parser.add_argument(f"--{switch}", action=action, default=False, help=about[switch])
    parser.add_class_arguments(settings, skip=switches | {command.positional or ""})
    return parser
