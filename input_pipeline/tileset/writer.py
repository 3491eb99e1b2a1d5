"""One slide of a tile set, written whole or not at all.

    slides/<slide>.<digest>.tfrecord   the records, until `finish` gives them their place among the shards
    slides/<slide>.npz                 where each record is, its columns, and what it was made from

The second file is replaced last and names the first by its digest, so a write that dies leaves the old slide as it was.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.tileset import tfrecord
from input_pipeline.tileset.mapped import MappedError, open_columns, write_columns
from input_pipeline.tileset.spec import Record, Spec, TileSetError, check_name, check_text_id, encode_record

VERSION = 1
INDEX: dict[str, np.dtype] = {"offset": np.dtype(np.int64), "length": np.dtype(np.int32), "crc": np.dtype(np.uint32)}
_F4 = np.dtype(np.float32)
CORE: dict[str, np.dtype] = {"x": _F4, "y": _F4, "mpp": _F4, "label": np.dtype(np.int32)}
EXTRA: np.dtype = np.dtype(np.float64)  # columns of the user: exact up to 2**53


def write_slide(
    root: str | os.PathLike,
    spec: Spec,
    slide_id: str,
    case_id: str,
    records: Iterable[Record],
    source: dict | None = None,
) -> dict[str, int]:
    """Write every tile of one slide; returns {'tiles': n, <partner>: tiles that have it}. Zero tiles are a result too.

    Slides may be written by many processes at once. `source` (names, sizes, hashes, ...) goes to the manifest.
    """
    check_text_id(slide_id, "slide_id")
    check_text_id(case_id, "case_id")
    folder = Path(root) / "slides"
    folder.mkdir(parents=True, exist_ok=True)
    sidecar = folder / f"{slide_id}.npz"
    _refuse_other_case(sidecar, slide_id, case_id)
    part = folder / f"{slide_id}.tfrecord.part"
    try:
        with open(part, "wb") as file:
            columns = _write_records(file, spec, slide_id, case_id, records)
            file.flush()
            os.fsync(file.fileno())
        _check_written(part, columns)
        meta = _meta(spec, slide_id, case_id, columns, source or {}, part.stat().st_size)
        shard = pending_path(folder, meta)
        os.replace(part, shard)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    text = np.frombuffer(json.dumps(meta, allow_nan=False).encode(), np.uint8)
    arrays = {"meta": text, **columns}
    write_columns(sidecar, {name: (a.dtype, len(a), [a]) for name, a in arrays.items()})
    for stale in set(pending_files(folder, slide_id)) - {shard}:
        stale.unlink()
    Path(folder / f"{slide_id}.removed").unlink(missing_ok=True)
    present = {p.name: int(columns[f"has_{p.name}"].sum()) for p in spec.partners}
    return {"tiles": meta["tiles"], **present}


def _refuse_other_case(sidecar: Path, slide_id: str, case_id: str) -> None:
    try:
        case = read_meta(sidecar)["case"] if sidecar.exists() else case_id
    except TileSetError:
        return  # a broken file is what writing the slide again mends
    if case != case_id:
        raise TileSetError(
            f"slide {slide_id!r} is already there with case {case!r}, now {case_id!r}: a slide id is used once; "
            "rename one, or remove_slide first",
            slide=slide_id,
        )


def _write_records(file, spec: Spec, slide_id: str, case_id: str, records: Iterable[Record]) -> dict[str, np.ndarray]:
    extra: dict[str, list[float]] | None = None
    rows: dict[str, list[float]] = {name: [] for name in (*INDEX, *CORE)}
    for p in spec.partners:
        rows |= {f"score_{p.name}": [], f"has_{p.name}": []}
    offset = 0
    for number, record in enumerate(records):
        try:
            values = _row(spec, record)
            payload = encode_record(spec, slide_id, case_id, record)
            if extra is None:
                extra = {name: [] for name in record.columns}
                for name in extra:
                    check_name(name, "a column")
            if set(record.columns) != set(extra):
                raise TileSetError(f"columns {sorted(record.columns)} differ from the first tile's {sorted(extra)}")
        except ValueError as error:
            raise TileSetError(f"slide {slide_id!r}, tile {number}: {error}", slide=slide_id) from error
        values |= {"offset": offset, "length": len(payload), "crc": tfrecord.write_record(file, payload)}
        offset += len(payload) + tfrecord.HEADER + tfrecord.FOOTER
        for name, value in values.items():
            rows[name].append(value)
        for name, values_of in extra.items():
            values_of.append(float(record.columns[name]))
    types = INDEX | CORE
    columns = {name: np.array(values, types.get(name, _F4)) for name, values in rows.items()}
    columns |= {n: columns[n].astype(np.bool_) for n in columns if n.startswith("has_")}
    return columns | {name: np.array(values, EXTRA) for name, values in (extra or {}).items()}


def _row(spec: Spec, record: Record) -> dict[str, float]:
    label = int(record.label)
    top = len(spec.label_names) or 2**31
    if not -1 <= label < top:
        raise TileSetError(f"label {label} is out of range: -1 (unknown) to {top - 1}")
    if unknown := set(record.score) - {p.name for p in spec.partners}:
        raise TileSetError(f"scores of {sorted(unknown)}, which are not partners")
    row = {"x": float(record.x), "y": float(record.y), "mpp": float(record.mpp), "label": label}
    for p in spec.partners:
        row[f"score_{p.name}"] = float(record.score.get(p.name, math.nan))
        row[f"has_{p.name}"] = record.partners.get(p.name) is not None
    return row


def _check_written(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Read back what lies on disk: count, places and checksums."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        found = [(offset, len(payload), crc) for offset, payload, crc in tfrecord.scan(file, size)]
    if found != list(zip(*(columns[name].tolist() for name in INDEX), strict=True)):
        raise TileSetError(f"{path.name}: {len(found)} records are on disk, not the {len(columns['crc'])} written")


def columns_digest(slide: str, case: str, columns: dict[str, np.ndarray]) -> str:
    """What a slide holds, in one hash: its names, every record's place and checksum, every column."""
    digest = hashlib.sha256(json.dumps([slide, case, sorted(columns)]).encode())
    for name in sorted(columns):
        digest.update(np.ascontiguousarray(columns[name]).tobytes())
    return digest.hexdigest()


def _meta(spec: Spec, slide: str, case: str, columns: dict[str, np.ndarray], source: dict, size: int) -> dict[str, Any]:
    return {
        "version": VERSION,
        "slide": slide,
        "case": case,
        "tiles": len(columns["crc"]),
        "bytes": size,
        "digest": columns_digest(slide, case, columns),
        "columns": sorted(set(columns) - set(INDEX)),
        "spec_sha256": spec.sha256,
        "params_sha256": spec.params_sha256,
        "source": source,
    }


def pending_path(folder: Path, meta: dict[str, Any]) -> Path:
    return folder / f"{meta['slide']}.{meta['digest'][:16]}.tfrecord"


def pending_files(folder: Path, slide_id: str) -> list[Path]:
    """Shards of a slide that have no place yet; at most one belongs to its sidecar."""
    pattern = re.compile(re.escape(slide_id) + r"\.[0-9a-f]{16}\.tfrecord")
    return sorted(folder / n for n in os.listdir(folder) if pattern.fullmatch(n))


_META = {"version": int, "slide": str, "case": str, "tiles": int, "bytes": int, "digest": str, "columns": list}
_META |= {"spec_sha256": str, "params_sha256": str, "source": dict}


def read_meta(sidecar: Path) -> dict[str, Any]:
    """What is known of a written slide; TileSetError when the file is not one that this version wrote."""
    try:
        meta = json.loads(open_columns(sidecar, {"meta"})["meta"].tobytes())
        if wrong := [k for k, t in _META.items() if not isinstance(meta.get(k), t)]:
            raise ValueError(f"{wrong} are missing or of another type")
        if meta["version"] != VERSION:
            raise ValueError(f"it has version {meta['version']}, this program reads version {VERSION}")
        check_text_id(meta["slide"], "slide_id")
        if meta["slide"] != sidecar.name.removesuffix(".npz"):
            raise ValueError(f"it belongs to slide {meta['slide']!r}")
        return meta
    except (KeyError, ValueError, AttributeError) as error:
        raise TileSetError(
            f"{sidecar.name} is not readable: {error}; delete that file and write the slide again (the same command)",
            file=str(sidecar),
        ) from error


def written_slides(root: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """slide id -> {case, tiles, spec_sha256, params_sha256, source, ...} of every slide on disk, finished or not."""
    metas = [read_meta(path) for path in _sidecars(Path(root))]
    return {m["slide"]: m for m in metas}


def _sidecars(root: Path) -> Iterator[Path]:
    folder = root / "slides"
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return (folder / n for n in names if n.endswith(".npz"))


def sidecar_columns(root: Path, slide: str, names: set[str]) -> dict[str, np.ndarray]:
    try:
        return open_columns(root / "slides" / f"{slide}.npz", names)
    except MappedError as error:
        raise TileSetError(f"slide {slide!r}: {error}; write the slide again", slide=slide) from error


def remove_slide(root: str | os.PathLike, slide_id: str) -> None:
    """Take a slide out of the set; its shard goes at the next `finish`, and no other shard is touched."""
    check_text_id(slide_id, "slide_id")
    folder = Path(root) / "slides"
    sidecar = folder / f"{slide_id}.npz"
    if not sidecar.exists():
        raise TileSetError(f"there is no slide {slide_id!r} in {root}", slide=slide_id)
    os.replace(sidecar, folder / f"{slide_id}.removed")
    for pending in pending_files(folder, slide_id):
        pending.unlink()
