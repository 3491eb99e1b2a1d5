"""What tests of cohorts share."""

import csv
from pathlib import Path


def edit_rows(table: Path, change) -> None:
    """Rewrite a CSV with `change(row)` applied to every row; a row for which it returns False is dropped."""
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    kept = [row for row in rows if change(row) is not False]
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in kept for name in row)))
        writer.writeheader()
        writer.writerows(kept)
