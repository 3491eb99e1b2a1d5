"""From embeddings of regions or tiles to slides: slides."""

import argparse
from pathlib import Path
from typing import Any

from mfl_jax.cli.parts import add_command, say


def add(commands) -> None:
    command = add_command(commands, "slides", slides, "what embeddings of regions or tiles are worth for slides")
    command.add_argument(
        "arms",
        nargs="+",
        help="NAME=FOLDER of <slide_id>.h5 (ours, CLAM's, TRIDENT's, STAMP's), NAME=RUN[@TILESET], or NAME=TILESET for "
        "statistics of its colours (regions: the mean of their tiles); one name several times: seeds of one arm",
    )
    command.add_argument("--table", type=Path, required=True, help="CSV: slide_id, case_id, label")
    command.add_argument("--tileset", type=Path, help="that runs embed, where an arm names none")
    command.add_argument("--label", default="label", help="column of the classes")
    command.add_argument(
        "--ways", default="knn,linear,hipt", help="knn, linear, and heads of mfl mil: 'knn;deepmil,hidden=64'"
    )
    command.add_argument("--folds", type=int, default=10)
    command.add_argument("--shares", default="1,0.25", help="of the training cases' labels")
    command.add_argument("--k", type=int, default=5, help="neighbours that vote")
    command.add_argument("--distance", choices=("euclidean", "cosine"), default="euclidean", help="of knn")
    command.add_argument("--head-seeds", type=int, default=1, help="fits of every head")
    command.add_argument("--epochs", type=int, help="of heads (default: what each head has)")
    command.add_argument("--pairs", default="", help="arms to be compared: a:b,c:b (default: all pairs)")
    command.add_argument(
        "--pretrained",
        nargs="+",
        default=[],
        metavar="NAME=WHERE",
        help="cases that an arm's encoder was trained on: its run, or a text file, a case a line",
    )
    both = command.add_mutually_exclusive_group()
    both.add_argument("--transductive", action="store_true", help="test cases of pre-training too; it is marked")
    both.add_argument("--held-out", action="store_true", help="leave out all cases that any arm was trained on")
    command.add_argument("--feature", default="he", help="of what runs embed")
    command.add_argument("--batch", type=int, default=256, help="of embedding")
    command.add_argument("--mpp", type=float, help="um per level-0 px, for STAMP's files, whose coordinates are um")
    command.add_argument("--resamples", type=int, default=2000, help="of cases, for intervals")
    command.add_argument("--seed", type=int, default=0, help="of folds, starts and resamples")
    command.add_argument("--out", type=Path, default=Path("slides"), help="folder for results.json and report.html")


def slides(options: argparse.Namespace) -> int:
    """Evaluate every arm in the same folds of patients, with all labels and few, and compare the arms in pairs."""
    from mfl_jax import bags, report, slide_arms, slide_level
    from mfl_jax.cli.mil import _cases, _heads, _numbers, _plain
    from mfl_jax.evaluators import slide_study

    table = bags.read_table(options.table, options.label)
    asked = slide_arms.parse(options.arms, options.tileset)
    seen = slide_arms.seen_cases(asked, {name: _cases(path) for name, path in _named(options.pretrained).items()})
    notes: tuple[str, ...] = ()
    if options.held_out:
        table, notes = slide_arms.kept(table, seen)
    of_files: dict[str, Any] = {"feature": options.feature, "batch": options.batch, "mpp": options.mpp}
    arms, digests = slide_arms.collect(asked, table, seen, **of_files, say=say)
    study = slide_study.study(
        arms,
        table,
        _heads(options.ways),
        folds=options.folds,
        shares=_numbers(options.shares),
        k=options.k,
        distance=options.distance,
        head_seeds=options.head_seeds,
        epochs=options.epochs,
        pairs=_pairs(options.pairs),
        transductive=options.transductive,
        resamples=options.resamples,
        seed=options.seed,
        say=say,
    )
    config = {name: _plain(value) for name, value in vars(options).items() if name not in ("run", "command")}
    more = {"config": config, "hashes": {f"checkpoint of {path}": digest for path, digest in digests.items()}}
    results, page = slide_level.write(options.out, study, notes=notes, more=more)
    print(report.readme(results))
    print(f"{results['answer']}\n{options.out / 'results.json'}  {page}")
    return 0


def _named(texts: list[str]) -> dict[str, Path]:
    found = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not Path(path).exists():
            raise ValueError(f"--pretrained is NAME=RUN or NAME=FILE that is there, not {text!r}")
        found[name] = Path(path)
    return found


def _pairs(text: str) -> list[tuple[str, str]] | None:
    found = []
    for part in filter(None, text.split(",")):
        first, colon, second = part.partition(":")
        if not colon:
            raise ValueError(f"--pairs is a:b,c:b, names of arms; {part!r} is none")
        found.append((first, second))
    return found or None
