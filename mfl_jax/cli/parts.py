"""What commands share."""

import argparse
import sys
from collections.abc import Callable
from typing import Any


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], help: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help, description=run.__doc__ or help)
    command.set_defaults(run=run)
    return command


def add_work(command: argparse.ArgumentParser) -> None:
    command.add_argument("--workers", type=int, help="processes (default: the cores there are; 0: in this process)")
    command.add_argument("--quiet", action="store_true", help="no progress bar")


def say(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)
