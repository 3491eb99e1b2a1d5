"""From written slides to a set: places for shards, the merged index, the files that TFDS opens, the manifest."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from input_pipeline.files import write_atomically
from input_pipeline.tileset import manifest
from input_pipeline.tileset.mapped import Column, write_columns
from input_pipeline.tileset.spec import Partner, Spec, TileSetError
from input_pipeline.tileset.writer import (
    CORE,
    EXTRA,
    INDEX,
    columns_digest,
    pending_path,
    sidecar_columns,
    written_slides,
)

_TFDS = "tensorflow_datasets.core.features"


ROWS = 1 << 20


def finish(
    root: str | os.PathLike,
    spec: Spec,
    splits: Mapping[str, Sequence[str]] | Mapping[str, float] | manifest.Assignment | None = None,
) -> dict[str, Any]:
    """Merge the written slides into a set and return its manifest. Running it again changes nothing.

    `splits` None keeps the splits there were and adds new cases to them (see `choose_splits`); a new set has all cases
    in 'train'. Cases in no split stay in the set, belong to no split, and are listed in the manifest.
    """
    root = Path(root)
    written = written_slides(root)
    if not written:
        raise TileSetError(f"{root} has no written slides: write_slide comes before finish")
    old = manifest.last_manifest(root)
    _check_same_spec(written, spec)
    _check_gone(root, written, old)
    slides = _place(written, old)
    document = _document(spec, slides, splits, old)
    missing = _missing(root, spec, slides, old)
    if missing:
        raise TileSetError(
            f"{len(missing)} shards are missing, first of slide {missing[0]!r}; write these slides again"
        )
    if old == document | {"sum": (old or {}).get("sum")} and not _stale(root, spec, slides):
        return document
    with contextlib.ExitStack() as stack:
        types = INDEX | column_types(slides)
        spools = {name: stack.enter_context(tempfile.TemporaryFile(dir=root)) for name in types}
        absent = _read_sidecars(root, slides, types, spools)
        manifest.write_manifest(root, document | {"complete": False})
        _move_shards(root, spec, slides, old)
        _write_index(root, slides, spools)
        _write_tiles(root, slides, document["cases"], spools)
    for name, text in tfds_files(spec, slides, absent).items():
        write_atomically(root / name, text.encode())
    manifest.write_manifest(root, document)
    for tombstone in (root / "slides").glob("*.removed"):
        tombstone.unlink()
    return document


def _check_same_spec(written: dict[str, dict], spec: Spec) -> None:
    other = [s for s, meta in written.items() if meta["spec_sha256"] != spec.sha256]
    if other:
        raise TileSetError(
            f"{len(other)} of {len(written)} slides were written with another specification or other parameters "
            f"(first: {other[0]!r}); write them again with these, or finish with theirs"
        )


def _check_gone(root: Path, written: dict[str, dict], old: dict | None) -> None:
    for entry in (old or {}).get("slides", ()):
        slide = entry["slide"]
        if slide not in written and not (root / "slides" / f"{slide}.removed").exists():
            raise TileSetError(f"slides/{slide}.npz is missing; write the slide again, or remove_slide", slide=slide)


def _place(written: dict[str, dict], old: dict | None) -> list[dict[str, Any]]:
    """Every slide keeps its shard number; new ones take the lowest free numbers. In the order of the shards."""
    slots = {s["slide"]: s["shard"] for s in (old or {}).get("slides", ()) if s["slide"] in written}
    taken = set(slots.values())
    free = (n for n in range(manifest.MAX_SLIDES) if n not in taken)
    for slide in sorted(written):
        if slide not in slots:
            slots[slide] = next(free, manifest.MAX_SLIDES)
    if max(slots.values()) >= manifest.MAX_SLIDES:
        raise TileSetError(f"a tile set holds at most {manifest.MAX_SLIDES} slides; make two sets")
    keys = ("slide", "case", "tiles", "bytes", "digest", "columns", "params_sha256", "source")
    return [{"shard": n} | {k: written[s][k] for k in keys} for s, n in sorted(slots.items(), key=lambda item: item[1])]


def _document(
    spec: Spec, slides: list[dict], splits: Mapping | manifest.Assignment | None, old: dict | None
) -> dict[str, Any]:
    cases = list(dict.fromkeys(s["case"] for s in slides))
    if not isinstance(splits, manifest.Assignment):
        splits = manifest.choose_splits(splits, cases, [0] * len(cases), old)
    checked = manifest.check_splits(splits.splits(cases), cases)
    document = {
        "format": manifest.FORMAT,
        "version": manifest.VERSION,
        "complete": True,
        "layout": manifest.LAYOUT + (manifest.GRIDS if spec.he_kind == "grid" else ""),
        "spec": spec.to_json(),
        "params_sha256": spec.params_sha256,
        "tiles": sum(s["tiles"] for s in slides),
        "slides": slides,
        "cases": cases,
        "splits": checked,
        "split_rule": splits.rule(cases),
        "cases_without_split": sorted(set(cases) - {c for members in checked.values() for c in members}),
    }
    document["hash"] = manifest.content_hash(document)
    return json.loads(json.dumps(document))


def _missing(root: Path, spec: Spec, slides: list[dict], old: dict | None) -> list[str]:
    placed = {(s["slide"], s["shard"], s["digest"]) for s in (old or {}).get("slides", ())}
    missing = []
    for s in slides:
        shard, pending = root / manifest.shard_name(spec.name, s["shard"]), pending_path(root / "slides", s)
        known = (s["slide"], s["shard"], s["digest"]) in placed
        path = pending if pending.exists() or not known else shard
        if not path.exists() or path.stat().st_size != s["bytes"]:
            missing.append(s["slide"])
    return missing


def _stale(root: Path, spec: Spec, slides: list[dict]) -> bool:
    """True when something that `finish` writes is not there; contents are what `verify` is for."""
    copies = [root / "manifest.json", root / "slides" / "manifest.json"]
    if not copies[0].exists() or copies[0].read_bytes() != copies[1].read_bytes():
        return True
    files = tfds_files(spec, slides, set())
    names = [*files, "index.npz", "tiles.npz", *(manifest.shard_name(spec.name, s["shard"]) for s in slides)]
    pending = any(pending_path(root / "slides", s).exists() for s in slides)
    return pending or any(not (root / n).exists() for n in names) or any((root / "slides").glob("*.removed"))


def _read_sidecars(
    root: Path, slides: list[dict], types: dict[str, np.dtype], spools: Mapping[str, IO[bytes]]
) -> set[str]:
    """Every slide's file is opened once, its columns go to one spool each, in the order of the shards: memory is that
    of one slide. A flipped bit must not enter the index of the set. Returns the partners that some tile does not have.
    """
    absent = set()
    for s in slides:
        columns = sidecar_columns(root, s["slide"], {*INDEX, *s["columns"]})
        if columns_digest(s["slide"], s["case"], columns) != s["digest"]:
            raise TileSetError(f"slides/{s['slide']}.npz is damaged; write the slide again", slide=s["slide"])
        for name, spool in spools.items():
            values = columns[name] if name in columns else np.full(s["tiles"], np.nan)
            spool.write(np.ascontiguousarray(values, types[name]).tobytes())
        absent |= {n.removeprefix("has_") for n, v in columns.items() if n.startswith("has_") and not v.all()}
    return absent


def _move_shards(root: Path, spec: Spec, slides: list[dict], old: dict | None) -> None:
    kept = {manifest.shard_name(spec.name, s["shard"]) for s in slides}
    if old:
        for name in {manifest.shard_name(old["spec"]["name"], s["shard"]) for s in old["slides"]} - kept:
            (root / name).unlink(missing_ok=True)
    for s in slides:
        pending = pending_path(root / "slides", s)
        if pending.exists():
            os.replace(pending, root / manifest.shard_name(spec.name, s["shard"]))


def _pieces(spool: IO[bytes], dtype: np.dtype) -> Iterator[np.ndarray]:
    spool.seek(0)
    while data := spool.read(ROWS * dtype.itemsize):
        yield np.frombuffer(data, dtype)


def _write_index(root: Path, slides: list[dict], spools: Mapping[str, IO[bytes]]) -> None:
    rows = sum(s["tiles"] for s in slides)
    shard = (np.full(s["tiles"], s["shard"], np.int32) for s in slides)
    columns: dict[str, Column] = {"shard": (np.dtype(np.int32), rows, shard)}
    columns |= {name: (dtype, rows, _pieces(spools[name], dtype)) for name, dtype in INDEX.items()}
    write_columns(root / "index.npz", columns)


def column_types(slides: list[dict]) -> dict[str, np.dtype]:
    """Every column that any slide has, and its type on disk."""
    names = {name for s in slides for name in s["columns"]}
    types = {name: CORE.get(name, EXTRA) for name in sorted(names)}
    types |= {n: np.dtype(np.float32) for n in names if n.startswith("score_")}
    return types | {n: np.dtype(np.bool_) for n in names if n.startswith("has_")}


def _write_tiles(root: Path, slides: list[dict], cases: list[str], spools: Mapping[str, IO[bytes]]) -> None:
    rows = sum(s["tiles"] for s in slides)
    code = np.dtype(np.int32)
    number = {case: i for i, case in enumerate(cases)}
    columns: dict[str, Column] = {
        "slide": (code, rows, (np.full(s["tiles"], i, code) for i, s in enumerate(slides))),
        "case": (code, rows, (np.full(s["tiles"], number[s["case"]], code) for s in slides)),
    }
    types = column_types(slides)
    columns |= {name: (dtype, rows, _pieces(spools[name], dtype)) for name, dtype in types.items()}
    write_columns(root / "tiles.npz", columns)


def _feature(kind: str, **body: Any) -> dict[str, Any]:
    module = {"Image": "image", "Text": "text", "Scalar": "scalar", "Tensor": "tensor", "Sequence": "sequence"}
    module |= {"ClassLabel": "class_label", "FeaturesDict": "features_dict"}
    suffix = "" if kind in ("Scalar", "FeaturesDict") else "_feature"
    return {"pythonClassName": f"{_TFDS}.{module[kind]}{suffix}.{kind}", **body}


def _tensor(kind: str, shape: Sequence[int], dtype: str, encoding: str = "none") -> dict[str, Any]:
    dimensions = {"dimensions": [str(n) for n in shape]} if shape else {}
    return _feature(kind, tensor={"shape": dimensions, "dtype": dtype, "encoding": encoding})


def _image(height: int, width: int, channels: int, dtype: str, encoding: str) -> dict[str, Any]:
    shape = {"dimensions": [str(height), str(width), str(channels)]}
    return _feature("Image", image={"shape": shape, "dtype": dtype, "encodingFormat": encoding})


def _partner_feature(spec: Spec, partner: Partner, absent: bool) -> dict[str, Any]:
    """TFDS knows no absent image: a partner that is absent somewhere is a sequence of none or one."""
    if partner.kind == "vector":
        if not absent:
            return _tensor("Tensor", spec.shape(partner), "float32")
        return _feature("Sequence", sequence={"feature": _tensor("Tensor", (), "float32"), "length": "-1"})
    height, width, channels = spec.shape(partner)
    planes = (height * channels, width, 1) if partner.stacked else (height, width, channels)
    image = _image(*planes, partner.dtype, partner.encoding)
    return _feature("Sequence", sequence={"feature": image, "length": "-1"}) if absent else image


def tfds_files(spec: Spec, slides: list[dict], absent: set[str]) -> dict[str, str]:
    """File name -> text of what tfds.builder_from_directory reads."""
    label = _tensor("Scalar", (), "int64")
    if spec.label_names:
        label = _feature("ClassLabel", classLabel={"numClasses": str(len(spec.label_names))})
    he = _image(*spec.he_shape, "uint8", spec.he_encoding)
    if spec.he_kind == "grid":
        he = _tensor("Tensor", spec.he_shape, spec.he_dtype, "bytes")
    features = {"he": he, "label": label}
    features |= {name: _feature("Text", text={}) for name in ("slide_id", "case_id")}
    features |= {name: _tensor("Scalar", (), "float32") for name in ("x", "y", "mpp")}
    features |= {p.name: _partner_feature(spec, p, p.name in absent) for p in spec.partners}
    lengths = ["0"] * (max(s["shard"] for s in slides) + 1)
    for s in slides:
        lengths[s["shard"]] = str(s["tiles"])
    split = {
        "name": manifest.TFDS_SPLIT,
        "shardLengths": lengths,
        "numBytes": str(sum(s["bytes"] for s in slides)),
        "filepathTemplate": "{DATASET}-{SPLIT}-{SHARD_INDEX}.{FILEFORMAT}",
    }
    info = {"name": spec.name, "version": "1.0.0", "fileFormat": "tfrecord", "splits": [split]}
    files = {
        "features.json": json.dumps(_feature("FeaturesDict", featuresDict={"features": features}), indent=1),
        "dataset_info.json": json.dumps(info, indent=1),
    }
    if spec.label_names:
        files["label.labels.txt"] = "".join(f"{name}\n" for name in spec.label_names)
    return files
