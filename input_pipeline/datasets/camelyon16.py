"""Camelyon16 as it is published: training/{normal,tumor}/*.tif, testing/images/*.tif, testing/reference.csv.

reference.csv has no header: name of the slide, Normal or Tumor, and more that is not read. One patient gave one slide.
"""

import csv
from collections.abc import Callable
from pathlib import Path

from input_pipeline.excluded import excluded
from input_pipeline.files import whole

CLASSES = ("normal", "tumor")
HEADER = ("slide_id", "case_id", "he", "label", "split")


def write_table(
    root: str | Path, out: str | Path, *, exclude: str = "camelyon16", say: Callable[[str], None] = lambda line: None
) -> int:
    """slide_id, case_id, he, label and split of every slide there is: a cohort for `mfl tile`, a table and the official
    splits for `mfl mil`. -> how many. Slides known to be bad are left out and named; exclude='' keeps them.
    """
    root, out = Path(root), Path(out)
    rows = [(p, label, "train") for label in CLASSES for p in sorted((root / "training" / label).glob("*.tif"))]
    truth = _reference(root / "testing" / "reference.csv")
    for path in sorted((root / "testing" / "images").glob("*.tif")):
        if path.stem not in truth:
            raise ValueError(f"{root / 'testing' / 'reference.csv'} does not say what {path.name} is")
        rows.append((path, truth[path.stem], "test"))
    if not rows:
        raise ValueError(f"{root} holds no training/normal/*.tif, training/tumor/*.tif or testing/images/*.tif")
    bad = excluded(exclude, [path.stem for path, *_ in rows]) if exclude else {}
    for name, why in bad.items():
        say(f"{name} is left out: {why}")
    with whole(out) as part, open(part, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(HEADER)
        for path, label, split in rows:
            if path.stem not in bad:
                table.writerow([path.stem, path.stem, str(path.absolute()), label, split])
    return len(rows) - len(bad)


def _reference(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    found: dict[str, str] = {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        for line, row in enumerate(csv.reader(file), 1):
            if not row or not row[0].strip():
                continue
            label = row[1].strip().lower() if len(row) > 1 else ""
            if label not in CLASSES:
                raise ValueError(f"{path}, row {line}: the second field is Normal or Tumor, not {label!r}")
            found[row[0].strip().removesuffix(".tif")] = label
    return found
