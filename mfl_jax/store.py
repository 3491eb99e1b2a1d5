"""Features of slides on disk, one h5 a slide: our own layout, and those that CLAM, TRIDENT and STAMP read.

    ours      OUT/<slide>.h5                           features, coords
    clam      OUT/h5_files/<slide>.h5, OUT/pt_files/<slide>.pt, OUT/patches/<slide>.h5, OUT/dataset.csv
    trident   OUT/<mag>x_<px>px_<overlap>px_overlap/features_<encoder>/<slide>.h5, and .../patches/<slide>_patches.h5
    stamp     OUT/<slide>.h5                           feats (float16), coords in um; OUT/slides.csv, OUT/patients.csv

A slide's file has its name when it is whole and never before. In every layout it carries our attributes, which others
ignore: where the scale comes from, the encoder, and a hash of all that decides what is in it, by which a rerun knows
what to do again.
"""

import contextlib
import hashlib
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from input_pipeline.cohort import is_label
from input_pipeline.features import ENCODER
from input_pipeline.files import read_json, write_json
from input_pipeline.table import read_rows
from input_pipeline.tile import unguarded, write_table

VERSION = 1
ROWS = 1024  # of a chunk: a chunk of one row, as others write them, is read 30 times slower
DTYPES = {
    "ours": ("float16", "float32"),
    "clam": ("float32",),
    "trident": ("float32", "float16"),
    "stamp": ("float16",),
}
STAMP_VERSION = "2.1.0"  # its readers refuse a newer one than their own


@dataclass(frozen=True)
class Sheet:
    """What is known of a slide and its tiles; coords are corners in level-0 px."""

    slide_id: str
    case_id: str
    coords: np.ndarray  # int64 [N, 2]
    mpp: float  # of level 0
    mpp_source: str
    tile_px: int
    tile_mpp: float
    overlap_px: int
    extent: tuple[int, int]  # width and height of level 0; what the tiles span where the slide is not at hand

    @property
    def side(self) -> int:
        """Of a tile in level-0 px: whole, for the slide encoders of TRIDENT want it so."""
        return round(self.tile_px * self.tile_mpp / self.mpp)


@dataclass(frozen=True)
class Layout:
    """Where a run writes, and of what; `sha256` is that of the encoder."""

    name: str
    out: Path
    dtype: str
    encoder: str
    sha256: str

    def __post_init__(self):
        if self.name not in DTYPES or self.dtype not in DTYPES[self.name]:
            allowed = "; ".join(f"{name}: {' or '.join(dtypes)}" for name, dtypes in DTYPES.items())
            raise ValueError(f"layout {self.name!r} with {self.dtype!r}; allowed are {allowed}")

    def files(self, slide_id: str, tile_px: int, tile_mpp: float, overlap: int) -> dict[str, Path]:
        """'features' is written last: where it lies, the others do."""
        if self.name == "clam":
            places = {"coords": f"patches/{slide_id}.h5", "pt": f"pt_files/{slide_id}.pt"}
            return {k: self.out / v for k, v in (places | {"features": f"h5_files/{slide_id}.h5"}).items()}
        if self.name == "trident":
            folder = self.out / f"{magnification(tile_mpp)}x_{tile_px}px_{overlap}px_overlap"
            encoder = re.sub(r"[^\w.-]+", "_", self.encoder)
            features = folder / f"features_{encoder}" / f"{slide_id}.h5"
            return {"coords": folder / "patches" / f"{slide_id}_patches.h5", "features": features}
        return {"features": self.out / f"{slide_id}.h5"}

    def files_of(self, sheet: Sheet) -> dict[str, Path]:
        return self.files(sheet.slide_id, sheet.tile_px, sheet.tile_mpp, sheet.overlap_px)


def magnification(mpp: float) -> int:
    """For readers that know no other scale; 0.5 um per px is '20x'."""
    return max(1, round(10 / mpp))


@contextlib.contextmanager
def writer(layout: Layout, sheet: Sheet, dim: int, key: str) -> Iterator[h5py.Dataset]:
    """The features of a slide, to be filled by rows; all files of it appear when the block ends well, else none."""
    files = layout.files_of(sheet)
    parts = {name: path.with_name(f".{path.name}.part") for name, path in files.items()}
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with h5py.File(parts["features"], "w", rdcc_nbytes=16 << 20) as file:
            yield _begin(file, layout, sheet, dim, key)
            if layout.name == "clam":
                _write_pt(parts["pt"], file["features"])
        if "coords" in files:
            with h5py.File(parts["coords"], "w") as file:
                _coordinates(file, sheet).attrs.update(_patch_attributes(layout, sheet))
        for name, path in files.items():
            with open(parts[name], "rb") as written:
                os.fsync(written.fileno())
            os.replace(parts[name], path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def remove_parts(path: Path) -> None:
    """What a run that was killed in the middle of a slide has left of it."""
    path.with_name(f".{path.name}.part").unlink(missing_ok=True)


def _begin(file: h5py.File, layout: Layout, sheet: Sheet, dim: int, key: str) -> h5py.Dataset:
    count = len(sheet.coords)
    chunks = (min(ROWS, count), dim) if count else None
    stamp = layout.name == "stamp"
    features = file.create_dataset("feats" if stamp else "features", (count, dim), layout.dtype, chunks=chunks)
    file.attrs.update(_attributes(layout, sheet, key))
    if stamp:
        file.create_dataset("coords", data=(sheet.coords * sheet.mpp).astype(np.float32))
        about = {"extractor": layout.encoder, "unit": "um", "tile_size_um": float(sheet.tile_px * sheet.tile_mpp)}
        file.attrs.update(about | {"tile_size_px": sheet.tile_px, "feat_type": "tile", "stamp_version": STAMP_VERSION})
        return features
    coords = _coordinates(file, sheet)
    if layout.name == "trident":
        coords.attrs.update(_patch_attributes(layout, sheet))
    return features


def _coordinates(file: h5py.File, sheet: Sheet) -> h5py.Dataset:
    return file.create_dataset("coords", data=np.asarray(sheet.coords, np.int64).reshape(-1, 2))


def _attributes(layout: Layout, sheet: Sheet, key: str) -> dict[str, Any]:
    return {
        "slide_id": sheet.slide_id,
        "case_id": sheet.case_id,
        "patch_size": sheet.tile_px,
        "patch_size_level0": sheet.side,
        "mpp_level0": sheet.mpp,
        "mpp_target": sheet.tile_mpp,
        "mpp_source": sheet.mpp_source,
        "level0_width": sheet.extent[0],
        "level0_height": sheet.extent[1],
        "encoder": layout.encoder,
        "encoder_sha256": layout.sha256,
        "config_sha256": key,
        "layout": layout.name,
        "version": VERSION,
    }


def _patch_attributes(layout: Layout, sheet: Sheet) -> dict[str, Any]:
    width, height = sheet.extent
    if layout.name == "clam":
        level = np.array(sheet.extent, np.int64)
        levels = {"patch_level": 0, "downsample": np.ones(2), "downsampled_level_dim": level, "level_dim": level}
        return {"patch_size": sheet.side, **levels, "name": sheet.slide_id, "save_path": "patches"}
    return {
        "patch_size": sheet.tile_px,
        "patch_size_level0": sheet.side,
        "level0_magnification": magnification(sheet.mpp),
        "target_magnification": magnification(sheet.tile_mpp),
        "overlap": sheet.overlap_px,
        "name": sheet.slide_id,
        "savetodir": ".",
        "level0_width": width,
        "level0_height": height,
    }


def stored_attributes(path: Path) -> dict[str, Any] | None:
    """What `writer` said of a file, and its `tiles`; None where there is no such file, it is not ours, or damaged."""
    try:
        with h5py.File(path, "r") as file:
            about = dict(file.attrs)
            rows = {len(file[n]) for n in ("features", "feats", "coords") if n in file}
            if len(rows) != 1 or not {"config_sha256", "encoder_sha256"} <= set(about):
                return None
            return about | {"tiles": rows.pop()}
    except (OSError, RuntimeError, KeyError, TypeError):
        return None


def slides_beside(layout: Layout, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the status table of an earlier call, for slides that were not asked for now and whose features lie there
    as they did: tables beside features list all slides of a folder."""
    path, asked = layout.out / "status.csv", {row["slide_id"] for row in rows}
    if not path.is_file():
        return []
    kept = []
    for _, guarded in read_rows(path, ("slide_id", "case_id", "state", "file"))[1]:
        row = {name: unguarded(text) for name, text in guarded.items()}
        if row["slide_id"] in asked or not row["file"]:
            continue
        about = stored_attributes(layout.out / row["file"])
        if about is not None and about["encoder_sha256"] == layout.sha256:
            kept.append(row)
    return kept


def write_encoder(layout: Layout, cases: Sequence[str] | None) -> None:
    """encoder.json: which encoder made the features of this folder, and the cases that it was trained on."""
    about: dict[str, Any] = {"encoder": layout.encoder, "encoder_sha256": layout.sha256}
    if cases is not None:
        text = "\n".join(sorted(cases))
        about |= {"train_cases": sorted(cases), "train_cases_sha256": hashlib.sha256(text.encode()).hexdigest()}
    write_json(layout.out / ENCODER, about)


def trained_cases(folder: Path) -> tuple[str, ...] | None:
    """Cases that the encoder of a folder's features was trained on; None where nothing says. The file lies in the
    folder, or above it, as where CLAM's and TRIDENT's layouts have folders of their own."""
    folder = Path(folder).absolute()
    for place in (folder, *folder.parents[:2]):
        if (place / ENCODER).is_file():
            about = read_json(place / ENCODER, "written by mfl extract")
            cases = about.get("train_cases")
            _check_same(place / ENCODER, about, folder)
            return None if cases is None else tuple(map(str, cases))
    return None


def _check_same(path: Path, about: Mapping[str, Any], folder: Path) -> None:
    """A file of another encoder says nothing of these features."""
    first = next(iter(sorted(folder.glob("*.h5"))), None)
    stored = None if first is None else stored_attributes(first)
    if stored is not None and stored["encoder_sha256"] != about.get("encoder_sha256"):
        raise ValueError(f"{path} is of another encoder than {first}: extract again, or move it away")


def write_tables(layout: Layout, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What CLAM and STAMP want beside the features: which slide is of which case, and the labels, STAMP's by patient;
    rows of the status table. What is to be said of them comes back.

    Verbatim, unlike our own tables: they look for files by these names, and would take a guard for a part of them.
    """
    labels = [name for name in rows[0] if is_label(name)] if rows else []
    if rows and layout.name == "clam":
        columns = ["case_id", "slide_id", "label", *(name for name in labels if name != "label")]
        write_table(layout.out / "dataset.csv", [{name: row.get(name, "") for name in columns} for row in rows])
    if rows and layout.name == "stamp":
        slides = [{"PATIENT": row["case_id"], "FILENAME": f"{row['slide_id']}.h5"} for row in rows]
        write_table(layout.out / "slides.csv", slides)
        return _write_patients(layout.out / "patients.csv", rows, labels)
    return ()


def _write_patients(path: Path, rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> tuple[str, ...]:
    """A patient has the label of those of its slides that have one; none where they differ, which is said."""
    said: dict[str, dict[str, set[str]]] = {}
    for row in rows:
        of_case = said.setdefault(row["case_id"], {name: set() for name in labels})
        for name in labels:
            of_case[name] |= {row[name]} - {""}
    one = [{name: next(iter(of[name])) if len(of[name]) == 1 else "" for name in labels} for of in said.values()]
    write_table(path, [{"PATIENT": case} | of for case, of in zip(said, one, strict=True)])
    differ = {name: [case for case, of in said.items() if len(of[name]) > 1] for name in labels}
    return tuple(
        f"{path.name}: {name} is left empty for {len(cases)} of {len(said)} patients, whose slides differ in it: "
        f"{', '.join(cases[:3])}"
        for name, cases in differ.items()
        if cases
    )


# --- torch's own format, of one float32 tensor: an archive of a pickle that names a storage, and the bytes of it


def _write_pt(path: Path, features: h5py.Dataset) -> None:
    """What torch.load(weights_only=True) gives back as a tensor [N, D]; written by hand, without torch or a pickler."""
    rows, columns = features.shape
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", tensor_pickle(rows, columns))
        archive.writestr("archive/byteorder", "little")
        with archive.open("archive/data/0", "w", force_zip64=True) as file:
            for start in range(0, rows, ROWS):
                file.write(features[start : start + ROWS].astype("<f4").tobytes())
        archive.writestr("archive/version", "3\n")


def tensor_pickle(rows: int, columns: int) -> bytes:
    """torch._utils._rebuild_tensor_v2(storage, 0, (rows, columns), (columns, 1), False, OrderedDict())."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(rows * columns)
    shape, stride = (number(a) + number(b) + b"\x86" for a, b in ((rows, columns), (columns, 1)))
    arguments = b"(" + storage + b"tQ" + number(0) + shape + stride + b"\x89" + b"ccollections\nOrderedDict\n)R" + b"t"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R."
