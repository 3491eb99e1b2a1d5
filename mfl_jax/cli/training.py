"""From a tile set to encoders, and to what they are worth: demo, train, report."""

import argparse
import logging
import signal
import sys
from pathlib import Path

from mfl_jax.cli.parts import add_command, add_work


def add(commands) -> None:
    for add in (_add_demo, _add_train, _add_report):
        add(commands)


def _add_demo(commands) -> None:
    command = add_command(commands, "demo", demo, "the whole path on slides drawn by the phantom")
    command.add_argument("--out", type=Path, default=Path("demo"))
    command.add_argument("--cases", type=int, default=16)
    command.add_argument("--size", type=int, default=1024, help="side of a slide in px")
    command.add_argument("--seed", type=int, default=0)
    add_work(command)


def demo(options: argparse.Namespace) -> int:
    """Draw paired slides, tile and register them, pack, verify and audit a tile set, and show a batch of it."""
    from mfl_jax.demo import demo

    sizes = {"cases": options.cases, "size": options.size, "seed": options.seed}
    demo(options.out, **sizes, workers=options.workers, progress=not options.quiet)
    return 0


def _add_train(commands) -> None:
    command = add_command(commands, "train", train, "train an encoder, or go on with a run")
    command.add_argument("--config", required=True, help="such as configs/mfl.py:phantom,optim.lr=1e-3")
    command.add_argument("--workdir", type=Path, required=True)
    command.add_argument("--override", action="store_true", help="go on although config or data changed; it is noted")
    command.add_argument("--quiet", action="store_true", help="no progress bar")


def train(options: argparse.Namespace) -> int:
    """Train in workdir, or go on where the run in it stopped; a SIGTERM saves and exits with 0."""
    from mfl_jax import config, train

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the loop has a handler of its own
    logging.basicConfig(level=logging.WARNING)
    try:
        chosen = config.load(options.config)
        state = train.train(chosen, options.workdir, progress=not options.quiet, override=options.override)
    except (train.TrainingFailed, OSError) as error:
        print(f"mfl train: {error}", file=sys.stderr)
        return 1
    print(f"step {int(state.step)}; {options.workdir / 'metrics.jsonl'}")
    return 0


def _add_report(commands) -> None:
    command = add_command(commands, "report", report, "one HTML file from a folder with results.json")
    command.add_argument("folder", type=Path)


def report(options: argparse.Namespace) -> int:
    """Make report.html anew from results.json and the pictures beside it."""
    from mfl_jax.report import remake

    print(f"wrote {remake(options.folder)}")
    return 0
