"""Tables of text (CSV, or TSV by the suffix), read strictly: what its header does not describe is refused, not guessed.

Every fault is a ValueError that names the file and the row, as a text editor counts rows.
"""

import contextlib
import csv
import os
from collections.abc import Collection, Iterator
from pathlib import Path

Rows = Iterator[tuple[int, list[str]]]


@contextlib.contextmanager
def open_table(path: str | os.PathLike, required: Collection[str] = ()) -> Iterator[tuple[list[str], Rows]]:
    """The header, and (row number, cells) one by one; each has the header's length, rows without any text are left out.

    For tables that do not fit into memory as text; otherwise `read_rows`.
    """
    path = Path(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=delimiter(path), strict=True)
            try:
                header = [name.strip() for name in next(reader, [])]
                _check_header(path, header, required)
                yield header, _rows(path, reader, len(header))
            except csv.Error as error:
                raise ValueError(f"{path}, row {reader.line_num}: not a row of a CSV: {error}") from error
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, after row {reader.line_num}: not text in UTF-8 (is it a slide or a spreadsheet? "
                    f"a table is saved as 'CSV UTF-8'): {error.reason}"
                ) from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a table: {error.strerror or error}") from error


def read_rows(
    path: str | os.PathLike, required: Collection[str] = ()
) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The header, and (row number, {column: text without spaces around it}) of every row."""
    with open_table(path, required) as (header, rows):
        return header, [(n, dict(zip(header, map(str.strip, row), strict=True))) for n, row in rows]


def delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _check_header(path: Path, header: list[str], required: Collection[str]) -> None:
    known = set(header)
    if missing := [name for name in required if name not in known]:
        other = next((d for d in (";", "\t", ",") if len(header) == 1 and d in header[0]), None)
        way_out = f"; its columns seem to be separated by {other!r}: save it with {delimiter(path)!r}" if other else ""
        raise ValueError(f"{path} lacks the columns {missing[:10]}; it has {[n[:80] for n in header[:20]]}{way_out}")
    if "" in known:
        raise ValueError(f"{path}: column {header.index('') + 1} has no name")
    if len(known) != len(header):
        twice = next(name for i, name in enumerate(header) if name in header[:i])
        raise ValueError(f"{path}: two columns are called {twice!r}")


def _rows(path: Path, reader, width: int) -> Rows:
    for row in reader:
        if not any(map(str.strip, row)):
            continue
        if len(row) != width:
            raise ValueError(f"{path}, row {reader.line_num}: {len(row)} fields, the header has {width}")
        yield reader.line_num, row
