"""From a tile set to encoders, and to what they are worth: demo, views, train, sweep, eval, report."""

import argparse
import functools
import logging
import shlex
import signal
import sys
from pathlib import Path

from mfl_jax.cli.parts import add_command, add_work, say


def add(commands) -> None:
    for add in (_add_demo, _add_views, _add_train, _add_sweep, _add_eval, _add_report):
        add(commands)


def _add_demo(commands) -> None:
    command = add_command(commands, "demo", demo, "the whole path, and the papers' comparison, on the phantom")
    command.add_argument("--out", type=Path, default=Path("demo"))
    command.add_argument("--seeds", type=int, default=1, help="runs of every arm (default 1)")
    command.add_argument("--seed", type=int, default=0, help="of the slides that are drawn")
    command.add_argument("--cases", type=int, help="patients (default 20)")
    command.add_argument("--size", type=int, help="side of a slide in px (default 1024, or 2560 with --gpu-size)")
    command.add_argument("--gpu-size", action="store_true", help="224 px and ResNet-50, for an accelerator")
    command.add_argument("--more", default="", help="overrides for every config, such as total.steps=50")
    command.add_argument("--side-by-side", type=int, help="runs at a time (default: a core each; 1 on an accelerator)")
    command.add_argument("--data-only", action="store_true", help="end with the tile set, train nothing")
    add_work(command)


def demo(options: argparse.Namespace) -> int:
    """Draw slides, tile, register, pack; train every arm with one budget; evaluate on unseen cases; write a report."""
    import dataclasses

    from mfl_jax.demo import GPU, SMALL, demo
    from mfl_jax.train import TrainingFailed

    size = GPU if options.gpu_size else SMALL
    asked = {"cases": options.cases, "slide": options.size}
    size = dataclasses.replace(size, **{name: value for name, value in asked.items() if value is not None})
    work = {"workers": options.workers, "progress": not options.quiet, "data_only": options.data_only}
    runs = {"seeds": options.seeds, "more": options.more, "side_by_side": options.side_by_side}
    try:
        demo(options.out, size, seed=options.seed, **runs, **work)
    except TrainingFailed as error:
        print(f"mfl demo: {error}", file=sys.stderr)
        return 1
    return 0


def _add_views(commands) -> None:
    command = add_command(commands, "views", views, "a picture of what the network will see")
    command.add_argument("--config", required=True, help="such as configs/mfl.py:phantom")
    command.add_argument("--out", type=Path, default=Path("views.png"))
    command.add_argument("--rows", type=int, default=8)
    command.add_argument("--seed", type=int, default=0)


def views(options: argparse.Namespace) -> int:
    """Draw the first tiles of training: the stored pixels, then every view of them."""
    from mfl_jax import config, contact_sheet

    chosen = config.load(options.config)
    print(f"wrote {contact_sheet.of_config(chosen, options.out, rows=options.rows, seed=options.seed)}")
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


def _add_sweep(commands) -> None:
    command = add_command(commands, "sweep", sweep, "train every run that sweep() of a config lists")
    command.add_argument("--config", required=True, help="such as configs/mfl.py:phantom; overrides hold for every run")
    command.add_argument("--workdir", type=Path, required=True, help="one folder a run, and sweep.csv")
    command.add_argument("--runner", choices=("local", "slurm"), default="local")
    command.add_argument(
        "--slurm", default="", help="options of sbatch by submitit: slurm_partition=gpu,timeout_min=720"
    )
    command.add_argument("--side-by-side", type=int, default=1, help="runs at a time, for --runner local on a CPU")
    command.add_argument("--dry-run", action="store_true", help="say what would run, and where each run stands")


def sweep(options: argparse.Namespace) -> int:
    """Run by run; run again, it goes on: finished runs are kept, failed and unfinished ones go on where they were."""
    from mfl_jax import sweep

    jobs = sweep.plan(options.config, options.workdir)
    if options.dry_run:
        for job in jobs:
            command = shlex.join(["mfl", "train", "--config", job.config, "--workdir", str(job.workdir)])
            print(f"{sweep.standing(job)}  {command}")
        return 0
    if options.side_by_side < 1:
        raise ValueError(f"--side-by-side is {options.side_by_side}; at least one run is trained at a time")
    local = functools.partial(sweep.local, side_by_side=options.side_by_side)
    submit = sweep.slurm(options.workdir, options.slurm) if options.runner == "slurm" else local
    failed = sweep.run(jobs, options.workdir, submit, say=lambda line: print(line, flush=True))
    print(f"{len(jobs) - len(failed)} of {len(jobs)} runs are done; table: {options.workdir / 'sweep.csv'}")
    for name, why in failed.items():
        print(f"mfl sweep: {name} failed: {why}", file=sys.stderr)
    return 1 if failed else 0


def _add_eval(commands) -> None:
    command = add_command(commands, "eval", evaluate, "what the features of trained runs are worth, with intervals")
    command.add_argument("runs", type=Path, nargs="+", help="workdirs of mfl train; seeds of one config are one arm")
    command.add_argument("--tileset", type=Path, required=True)
    command.add_argument(
        "--task",
        default="probe",
        help="probe,knn,few_label,paper_head,retrieval,clusters,decode,batch_effect,distance_ratio,saliency",
    )
    command.add_argument("--target", default="label", help="a column of the tile set (default: label)")
    command.add_argument("--threshold", type=float, help="two classes: above it, and not")
    command.add_argument("--regression", action="store_true", help="the target is a number")
    command.add_argument("--decoded", default="", help="partners for decode (default: all of the tile set)")
    command.add_argument(
        "--truth",
        default="",
        help="for saliency: if:MARKER, nuclei, none (default: a channel called a marker, or a map)",
    )
    command.add_argument("--near-um", type=float, default=0.0, help="of distance_ratio: nearer pairs of tiles are near")
    command.add_argument("--far-um", type=float, default=0.0, help="of distance_ratio: farther pairs are far")
    command.add_argument(
        "--across",
        choices=("case", "slide"),
        default="case",
        help="of retrieval: answers are of another case, or slide",
    )
    command.add_argument("--asking", type=int, help="of retrieval: tiles of this class alone ask (1: those above)")
    command.add_argument("--baselines", default="", help="random, and colour of tiles or mean of regions")
    command.add_argument("--feature", default="he", help="of what the method embeds")
    command.add_argument("--batch", type=int, default=256)
    command.add_argument("--resamples", type=int, default=2000, help="of cases, for intervals")
    command.add_argument("--transductive", action="store_true", help="allow test cases in pre-training; it is marked")
    command.add_argument("--out", type=Path, default=Path("eval"), help="folder for results.json and report.html")


def evaluate(options: argparse.Namespace) -> int:
    """Embed a tile set once a run, evaluate on its test cases, compare the arms, and write a report."""
    from input_pipeline.tileset import TileSet
    from mfl_jax import compare, report
    from mfl_jax.evaluators import Task

    kinds = _names(options.task)
    if options.asking is not None and "retrieval" not in kinds:
        raise ValueError("--asking goes with --task retrieval")
    task = Task(options.target, options.target, options.threshold, options.regression, asking=options.asking)
    results, pictures = compare.evaluate(
        options.runs,
        TileSet.open(options.tileset),
        task,
        kinds=kinds,
        baselines=_names(options.baselines),
        decoded=_names(options.decoded),
        truth=options.truth,
        limits=(options.near_um, options.far_um),
        across=options.across,
        feature=options.feature,
        batch=options.batch,
        transductive=options.transductive,
        resamples=options.resamples,
        say=say,
    )
    written = report.save(options.out, results, pictures)
    print(report.readme(results))
    print(f"{results['answer']}\n{options.out / 'results.json'}  {written}")
    return 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _add_report(commands) -> None:
    command = add_command(commands, "report", report, "one HTML file from a folder with results.json")
    command.add_argument("folder", type=Path)


def report(options: argparse.Namespace) -> int:
    """Make report.html anew from results.json and the pictures beside it."""
    from mfl_jax.report import remake

    print(f"wrote {remake(options.folder)}")
    return 0
