"""From features of tiles to predictions of slides: mil."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mfl_jax.cli.parts import add_command, say


def add(commands) -> None:
    command = add_command(commands, "mil", mil, "predict slides from bags of tile features, in nested folds")
    command.add_argument(
        "features",
        nargs="+",
        help="folder of <slide_id>.h5 (ours, CLAM's, TRIDENT's, STAMP's), or several as NAME=FOLDER",
    )
    command.add_argument("--table", type=Path, required=True, help="CSV: slide_id, case_id, label (and he: the slide)")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument(
        "--heads", default="meanpool,chowder,deepmil", help="names; with settings: 'chowder,top=5;clam'"
    )
    command.add_argument("--label", default="label", help="column of the classes")
    command.add_argument("--time", default="", help="column of the time to the event: survival")
    command.add_argument("--event", default="event", help="column of the event: 1, or 0 for censored")
    command.add_argument(
        "--exclude", default="", help="slides to leave out: camelyon16 (known to be bad), or a CSV (slide_id, why)"
    )
    command.add_argument("--splits", type=Path, help="official splits: CLAM's folder, or a CSV (slide_id,split[,fold])")
    command.add_argument("--folds", type=int, default=5, help="outer folds, where there are no --splits")
    command.add_argument("--inner", type=int, default=5, help="inner folds, where a fold has no val")
    command.add_argument("--seeds", type=int, default=3)
    command.add_argument("--lr", type=_numbers, default=(1e-3,), help="one, or several to choose from: 1e-3,1e-4")
    command.add_argument("--decay", type=_numbers, default=(0.0,), help="weight decay, one or several")
    command.add_argument("--epochs", type=int, default=40, help="at most")
    command.add_argument("--patience", type=int, default=8, help="epochs without a better loss on val")
    command.add_argument("--batch", type=int, default=16)
    command.add_argument("--tiles", type=int, default=1000, help="of a bag, in one step")
    command.add_argument("--raw", action="store_true", help="features as they are, not scaled by the tiles trained on")
    command.add_argument("--seed", type=int, default=0, help="of folds, starts and resamples")
    command.add_argument("--maps", type=int, default=6, help="slides whose attention is drawn")
    command.add_argument(
        "--mpp", type=float, help="um per level-0 px, where files do not say (STAMP's, whose coordinates are um)"
    )
    command.add_argument("--origin", choices=("image", "bounds"), default="image", help="what GeoJSON counts from")
    command.add_argument(
        "--pretrained",
        type=Path,
        help="cases that the encoder was trained on: its run, or a text file, a case a line (default: as mfl extract "
        "wrote beside the features)",
    )
    command.add_argument("--quiet", action="store_true", help="no progress")


def mil(options: argparse.Namespace) -> int:
    """Train every head on every set of features, fold by fold; write predictions, intervals, maps and a report."""
    from mfl_jax import bags
    from mfl_jax.evaluators import mil
    from mfl_jax.evaluators.mil import document

    table = bags.read_table(options.table, options.label, options.time, options.event)
    every = table.slides
    table = bags.without(table, options.exclude, say) if options.exclude else table
    given = {name: bags.read_folder(path, table, mpp=options.mpp) for name, path in _folders(options.features).items()}
    dealt = {"inner": options.inner, "seed": options.seed}
    folds = (
        mil.read_splits(options.splits, table, left_out=sorted(set(every) - set(table.slides)), **dealt)
        if options.splits
        else mil.nested(table, outer=options.folds, **dealt)
    )
    settings = mil.Settings(options.epochs, options.patience, options.batch, options.tiles, not options.raw)
    seen = {name: _pretrained(path, options.pretrained) for name, path in _folders(options.features).items()}
    pretrained = {name: cases for name, cases in seen.items() if cases is not None}
    chosen = {"seeds": options.seeds, "lrs": options.lr, "decays": options.decay, "seed": options.seed}

    def tell(arm: str, done: int, total: int) -> None:
        say(f"{arm}: {done} of {total} fits")

    found = mil.study(
        given,
        table,
        _heads(options.heads),
        folds=folds,
        settings=settings,
        pretrained=pretrained,
        say=None if options.quiet else tell,
        **chosen,
    )
    config = {name: _plain(value) for name, value in vars(options).items() if name not in ("run", "command")}
    notes = [_known(name, cases, table.cases) for name, cases in seen.items()]
    for note in notes:
        say(note)
    of_maps = {"drawn": options.maps, "origin": options.origin}
    page = document.write(options.out, found, given, notes=notes, config=config, **of_maps)
    for arm in document.ordered(found):
        metric = arm.result.metrics.get(found.metric)
        low, _, high = mil.spread(arm, found.metric)
        print(f"{found.metric} {metric or 'not defined'}; folds {low:.3f} to {high:.3f}  {arm.name}")
        for note in arm.result.notes:
            say(f"{arm.name}: {note}")
    print(f"wrote {page}")
    return 0


def _pretrained(folder: Path, given: Path | None) -> Sequence[str] | None:
    """Cases that the encoder was trained on: as said, or as mfl extract wrote beside its features."""
    from mfl_jax import bags, store

    return _cases(given) if given else store.trained_cases(bags.find_folder(folder))


def _known(name: str, cases: Sequence[str] | None, tested: Sequence[str]) -> str:
    if cases is None:
        return f"{name}: which cases the encoder saw is not known (--pretrained): of those, figures are too good."
    both = len(set(cases) & set(tested))
    what = "transductive, and too good" if both else "inductive"
    return f"{name}: of {len(set(cases))} cases that the encoder was trained on, {both} are in the table: {what}."


def _cases(path: Path) -> list[str]:
    if path.is_dir():
        from mfl_jax.trained import read_run

        return list(read_run(path)[1].train_cases)
    return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, nor several with commas between") from None


def _heads(text: str) -> list[str]:
    """'a,b' are two heads without settings; where there is a ';' or a '=', heads are separated by ';'."""
    parts = text.split(";") if ";" in text or "=" in text else text.split(",")
    return [part.strip() for part in parts if part.strip()]


def _folders(given: list[str]) -> dict[str, Path]:
    """NAME=FOLDER, or a folder whose name is its last part."""
    found: dict[str, Path] = {}
    for text in given:
        name, equals, path = ("", "", text) if Path(text).is_dir() else text.partition("=")
        folder = Path(path if equals else text)
        name = name if equals else folder.resolve().name
        if name in found:
            raise ValueError(f"two sets of features are called {name!r}: give NAME=FOLDER")
        found[name] = folder
    return found
