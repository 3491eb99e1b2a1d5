"""Columns on disk: an .npz whose members are stored, aligned and written piece by piece, so that a memory map opens it.

np.load reads these files too. A file that claims more than it holds is refused before anything is mapped.
"""

import io
import os
import re
import struct
import zipfile
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

import numpy as np

from input_pipeline.files import whole

ALIGN = 64
_PAD = 0xD935  # the id that zip tools use for alignment padding
_LOCAL = struct.Struct("<4s5H3L2H")
_TYPE = rb"\|[biu]1|<[iu][248]|<f[248]"
_HEADER = re.compile(rb"\{'descr': '(%s)', 'fortran_order': False, 'shape': \((\d{1,15}),\), \}\s*" % _TYPE)


class MappedError(ValueError):
    """A file that is not one of stored columns."""


Column = tuple[np.dtype, int, Iterable[np.ndarray]]


def write_columns(path: Path, columns: Mapping[str, Column]) -> None:
    """{name: (dtype, rows, pieces)} -> path, in memory of one piece; the pieces of a column add up to its rows."""
    with whole(path) as part, open(part, "wb") as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for name, column in columns.items():
            _write_member(archive, file.tell(), name, *column)


def _write_member(
    archive: zipfile.ZipFile, at: int, name: str, dtype: np.dtype, rows: int, pieces: Iterable[np.ndarray]
) -> None:
    header = io.BytesIO()
    plain = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(header, plain)
    info = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
    padding = -(at + _LOCAL.size + len(info.filename.encode()) + 20 + 4) % ALIGN  # 20: the sizes of zip64
    info.extra = struct.pack("<HH", _PAD, padding) + bytes(padding)
    written = 0
    with archive.open(info, "w", force_zip64=True) as member:
        member.write(header.getvalue())
        for piece in pieces:
            member.write(np.ascontiguousarray(piece, dtype).data.cast("B") if len(piece) else b"")
            written += len(piece)
    if written != rows:
        raise MappedError(f"column {name!r} was given {written} rows, {rows} were announced")


def open_columns(path: Path, only: Container[str] | None = None) -> dict[str, np.ndarray]:
    """{name: read-only memory map}; nothing is read but the headers."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            size = os.fstat(file.fileno()).st_size
            members = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
            return {n: _map_member(path, file, size, m) for n, m in members.items() if only is None or n in only}
    except FileNotFoundError:
        raise MappedError(f"{path} is missing") from None
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, struct.error, RuntimeError) as error:
        raise MappedError(f"{path} is not a file of columns that this version reads: {error}") from error


def _map_member(path: Path, file, size: int, member: zipfile.ZipInfo) -> np.ndarray:
    if member.compress_type != zipfile.ZIP_STORED or not member.filename.endswith(".npy") or member.flag_bits & 1:
        raise MappedError(f"member {member.filename!r} is compressed, encrypted or not an array")
    file.seek(member.header_offset)
    local = _LOCAL.unpack(file.read(_LOCAL.size))
    if local[0] != b"PK\x03\x04":
        raise MappedError(f"member {member.filename!r} has no header")
    start = member.header_offset + _LOCAL.size + local[-2] + local[-1]
    if start + member.file_size > size:
        raise MappedError(f"member {member.filename!r} runs past the end of the file")
    file.seek(start)
    preface = file.read(10)
    header = file.read(int.from_bytes(preface[8:10], "little"))
    found = _HEADER.fullmatch(header)
    if preface[:8] != b"\x93NUMPY\x01\x00" or not found:  # parsed strictly: numpy's parser evaluates what it finds
        raise MappedError(f"member {member.filename!r} is not one column of numbers: {header[:80]!r}")
    dtype, rows, offset = np.dtype(found[1].decode()), int(found[2]), file.tell()
    if offset + rows * dtype.itemsize != start + member.file_size:
        raise MappedError(f"member {member.filename!r} does not have the size that its {rows} rows need")
    if rows == 0:
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype, "r", offset, (rows,)))  # a plain array reads single values faster
