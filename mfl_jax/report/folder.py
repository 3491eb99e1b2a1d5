"""A run's record on disk: results.json, pictures/, and the report.html that is made of nothing else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.files import read_json, write_atomically, write_json
from mfl_jax.report.page import write
from mfl_jax.report.pictures import jpeg
from mfl_jax.report.schema import validate

SUFFIXES = (".jpg", ".png")


def save(folder: str | Path, results: Mapping[str, Any], pictures: Mapping[str, bytes | np.ndarray]) -> Path:
    """Writes all three and returns the report's path. The record is written first: a fault of the page costs no result.

    results.json stays even where it is not what schema.py says, which then raises.
    """
    folder = Path(folder)
    write_json(folder / "results.json", results)
    validate(results)
    (folder / "pictures").mkdir(exist_ok=True)
    for name, picture in pictures.items():
        if Path(name).name != name or name.startswith("."):
            raise ValueError(f"a picture's name is a file's name, without folders and no dot before it: {name!r}")
        write_atomically(folder / "pictures" / f"{name}.jpg", jpeg(picture))
    return remake(folder)


def remake(folder: str | Path) -> Path:
    """The report again, from the record. Pictures of an earlier run that nothing names are left where they are."""
    folder = Path(folder)
    results = read_json(folder / "results.json", "the results of a run")
    validate(results)
    named = set(_pictures(results))
    files = {path.stem: path for path in sorted((folder / "pictures").glob("*")) if path.suffix in SUFFIXES}
    return write(
        folder / "report.html", results, {name: files[name].read_bytes() for name in sorted(named & set(files))}
    )


def _pictures(value: Any) -> list[str]:
    """Every name under a key 'picture'."""
    if isinstance(value, list):
        return [name for item in value for name in _pictures(item)]
    if not isinstance(value, dict):
        return []
    own = [value["picture"]] if isinstance(value.get("picture"), str) else []
    return own + [name for item in value.values() for name in _pictures(item)]
