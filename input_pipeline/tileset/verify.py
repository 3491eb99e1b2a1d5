"""Find every fault of a tile set on disk: what `finish` wrote is read back and compared, record by record."""

import os
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from input_pipeline.tileset import Example, TileSet, manifest, tfrecord
from input_pipeline.tileset.mapped import MappedError, open_columns
from input_pipeline.tileset.merge import tfds_files
from input_pipeline.tileset.spec import TileSetError
from input_pipeline.tileset.writer import INDEX, columns_digest, read_meta

MAX_FAULTS_A_SLIDE = 20


def verify(
    root: str | os.PathLike, deep: bool = False, *, workers: int | None = None, progress: bool = False
) -> list[str]:
    """One line a fault, naming file, offset, id and slide; an empty list means that everything is as it was written.

    `deep` decodes every image and vector too. Memory is that of one record a worker.
    """
    root = Path(root)
    faults = list(_archive_faults(root))
    try:
        tileset = TileSet.open(root)
    except TileSetError as error:
        return [*faults, str(error), *_stray(root, None)]
    with tileset, ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        numbers, codes = range(len(tileset.slides)), {case: i for i, case in enumerate(tileset.cases)}
        checks = pool.map(lambda n: list(_slide_faults(tileset, n, codes, deep)), numbers)
        for found in tqdm(checks, "verify", len(numbers), unit="slide", disable=not progress):
            faults += found
        faults += _tfds_faults(tileset)
        faults += _copy_faults(root)
        faults += _stray(root, tileset)
    return faults


def _archive_faults(root: Path) -> Iterator[str]:
    for path in [root / "index.npz", root / "tiles.npz", *sorted((root / "slides").glob("*.npz"))]:
        try:
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
            if bad:
                yield f"{path.relative_to(root)}: column {bad} does not match its checksum"
        except FileNotFoundError:
            yield f"{path.relative_to(root)} is missing; run finish again"
        except (zipfile.BadZipFile, ValueError, OSError, EOFError, RuntimeError, zlib.error) as error:
            yield f"{path.relative_to(root)} is damaged: {error}"


def _slide_faults(tileset: TileSet, number: int, case_codes: dict[str, int], deep: bool) -> Iterator[str]:
    entry = tileset.manifest["slides"][number]
    slide, rows = entry["slide"], slice(*tileset.first_row[number : number + 2])
    columns = {name: tileset.index[name][rows] for name in INDEX}
    columns |= {name: tileset.tiles[name][rows] for name in entry["columns"]}
    codes = {"slide": number, "case": case_codes[entry["case"]]}
    wrong = [(tileset.tiles[name][rows] != code).any() for name, code in codes.items()]
    if any(wrong) or (tileset.index["shard"][rows] != entry["shard"]).any():
        yield f"slide {slide!r}: shard, slide or case in index.npz or tiles.npz are not those of the manifest"
    if columns_digest(slide, entry["case"], columns) != entry["digest"]:
        yield f"slide {slide!r}: its rows in index.npz or tiles.npz are not those of the manifest"
    yield from _sidecar_faults(tileset.root, entry)
    name = manifest.shard_name(tileset.spec.name, entry["shard"])
    try:
        with open(tileset.root / name, "rb") as file:
            yield from _first(_shard_faults(tileset, file, name, number, deep))
    except FileNotFoundError:
        yield f"{name}: the shard of slide {slide!r} is missing"
    except OSError as error:
        yield f"{name}: the shard of slide {slide!r} cannot be read: {error}"


def _first(faults: Iterator[str]) -> Iterator[str]:
    for count, fault in enumerate(faults):
        if count == MAX_FAULTS_A_SLIDE:
            yield f"... and more in the same shard; the first {MAX_FAULTS_A_SLIDE} are listed"
            return
        yield fault


def _sidecar_faults(root: Path, entry: dict[str, Any]) -> Iterator[str]:
    path = root / "slides" / f"{entry['slide']}.npz"
    if not path.exists():
        yield f"slides/{path.name} is missing: slide {entry['slide']!r} can be read, but the next finish will refuse"
        return
    try:
        meta, columns = read_meta(path), open_columns(path)
        if meta["digest"] != entry["digest"]:
            yield f"slide {entry['slide']!r} was written again after the last finish; run finish"
        del columns["meta"]
        if columns_digest(meta["slide"], meta["case"], columns) != meta["digest"]:
            yield f"slides/{path.name} does not hold what it says; write the slide again"
    except (TileSetError, MappedError) as error:
        yield f"slides/{path.name}: {error}"


def _shard_faults(tileset: TileSet, file: BinaryIO, name: str, number: int, deep: bool) -> Iterator[str]:
    """Each record where the index says; that they lie without gaps was checked when they were written."""
    entry, size = tileset.manifest["slides"][number], os.fstat(file.fileno()).st_size
    if size != entry["bytes"]:
        yield f"{name}: it has {size} bytes, not the {entry['bytes']} written"
    for i in range(*tileset.first_row[number : number + 2]):
        offset, length = int(tileset.index["offset"][i]), int(tileset.index["length"][i])
        place = f"{name}, offset {offset}, tile {i}, slide {entry['slide']!r}"
        whole = tfrecord.HEADER + max(length, 0) + tfrecord.FOOTER
        try:
            if not 0 <= offset <= size - whole:
                raise tfrecord.RecordError(f"{whole} bytes do not fit in a file of {size}")
            payload, crc = tfrecord.check_record(os.pread(file.fileno(), whole, offset), length)
            if crc != tileset.index["crc"][i]:
                raise tfrecord.RecordError("the checksum is not the one in the index")
            if deep:
                tileset.decode(Example(i, entry["slide"], name, offset, payload))
                _check_facts(tileset, i, tfrecord.decode_example(payload))
        except ValueError as error:
            yield f"{place}: {error}"


def _check_facts(tileset: TileSet, i: int, features: dict[str, tfrecord.Decoded]) -> None:
    """What a record says of itself is what its row says."""
    slide, case = tileset.slides[tileset.tiles["slide"][i]], tileset.cases[tileset.tiles["case"][i]]
    expected: dict[str, tfrecord.Decoded] = {"slide_id": [slide.encode()], "case_id": [case.encode()]}
    expected |= {name: tileset.tiles[name][i : i + 1] for name in ("x", "y", "mpp", "label")}
    for name, value in expected.items():
        found = features.get(name)
        if isinstance(value, list):
            same = found == value
        else:
            same = isinstance(found, np.ndarray) and np.array_equal(found, value, equal_nan=True)
        if not same:
            raise TileSetError(f"{name} is {found!r} in the record and {value!r} in tiles.npz")
    for partner in tileset.spec.partners:
        if bool(len(features.get(partner.name, ()))) != tileset.tiles[f"has_{partner.name}"][i]:
            raise TileSetError(f"has_{partner.name} in tiles.npz does not agree with the record")


def _copy_faults(root: Path) -> Iterator[str]:
    copy = root / "slides" / "manifest.json"
    if not copy.exists() or copy.read_bytes() != (root / "manifest.json").read_bytes():
        yield "slides/manifest.json is not the copy of manifest.json that finish wrote; run finish again"


def _tfds_faults(tileset: TileSet) -> Iterator[str]:
    absent = {p.name for p in tileset.spec.partners if not tileset.tiles[f"has_{p.name}"].all()}
    for name, text in tfds_files(tileset.spec, tileset.manifest["slides"], absent).items():
        try:
            found = (tileset.root / name).read_bytes()
        except OSError:
            yield f"{name} is missing; run finish again"
            continue
        if found != text.encode():
            yield f"{name} is not what finish wrote; run finish again"


def _stray(root: Path, tileset: TileSet | None) -> Iterator[str]:
    """Files that look like data and belong to no slide: shards too many, and what a dead writer left."""
    slides = tileset.manifest["slides"] if tileset else []
    expected = {manifest.shard_name(tileset.spec.name, s["shard"]) for s in slides} if tileset else set()
    known = {s["slide"] for s in slides}
    for path in sorted(p for folder in (root, root / "slides") if folder.is_dir() for p in folder.iterdir()):
        name = str(path.relative_to(root))
        if path.name.endswith(".part"):
            yield f"{name} was left by a writer that died; delete it, or write the slide again"
        elif path.parent == root and ".tfrecord" in path.name and tileset and path.name not in expected:
            yield f"{name} is a shard of no slide; delete it"
        elif path.parent != root and path.name.endswith(".tfrecord"):
            yield f"{name} waits for finish, or was left by a writer that died"
        elif path.parent != root and path.name.endswith(".npz") and tileset and path.name[:-4] not in known:
            yield f"{name} is a slide that is not in the manifest; run finish"
