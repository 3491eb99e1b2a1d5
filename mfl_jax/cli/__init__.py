"""`mfl <command>`: one function a command, thin over the packages; heavy imports wait until a command needs them."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Sequence

from mfl_jax import process
from mfl_jax.cli import cohorts, features, mil, regions, search, slides, training
from mfl_jax.cli.parts import add_command


def command() -> int:
    """`mfl`, in a process of its own."""
    process.settle()
    return main()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 all is well, 1 the work found faults (failed slides, a damaged set, a leak), 2 a wrong request."""
    options = parser().parse_args(arguments)
    with contextlib.suppress(ValueError):  # not the main thread: whoever runs us there handles signals
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"mfl {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mfl {options.command}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("mfl", description="Encoders for routine H&E, taught by denser partner images.")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    add_command(commands, "doctor", doctor, "versions, devices, readers, and what is missing")
    for group in (cohorts, training, features, regions, mil, slides, search):
        group.add(commands)
    return top


def doctor(options: argparse.Namespace) -> int:
    from mfl_jax.doctor import report

    lines, healthy = report()
    print("\n".join(lines))
    return 0 if healthy else 1
