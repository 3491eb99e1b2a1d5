"""What a tile set holds: the specification, one record, and how its images and vectors become bytes and back."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import imagecodecs
import numpy as np

from input_pipeline.tileset import png, tfrecord

MAX_CHANNELS = 256
MAX_FEATURES = 16384
ENCODINGS = {"image": ("jpeg", "png"), "grid": ("float16",)}
RESERVED = {"he", "id", "mask", "label", "slide", "case", "slide_id", "case_id", "x", "y", "mpp"}
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")


class TileSetError(ValueError):
    """Something is wrong with a tile set; `id`, `slide`, `file` and `offset` say where, when it is one tile."""

    def __init__(self, message: str, id: int | None = None, slide: str = "", file: str = "", offset: int = -1):
        super().__init__(message)
        self.id, self.slide, self.file, self.offset = id, slide, file, offset


@dataclass(frozen=True)
class Partner:
    """One dense partner of the H&E tile. Images and maps are square; a vector has `length` values."""

    name: str
    kind: str = "image"  # image | map (labels: nearest neighbour, never JPEG) | vector
    channels: int = 1
    dtype: str = "uint8"
    encoding: str = "png"  # jpeg | png | float32
    channel_names: tuple[str, ...] = ()
    size: int | None = None  # px; None: as the H&E tile
    length: int | None = None
    mpp: float | None = None  # None: as the H&E tile

    def __post_init__(self):
        object.__setattr__(self, "channel_names", tuple(self.channel_names))
        check_name(self.name, "a partner")
        allowed = {
            "image": {("uint8", "jpeg"), ("uint8", "png"), ("uint16", "png")},
            "map": {("uint16", "png")},
            "vector": {("float32", "float32")},
        }
        if self.kind not in allowed:
            raise TileSetError(f"partner {self.name!r}: kind is image, map or vector, not {self.kind!r}")
        if (self.dtype, self.encoding) not in allowed[self.kind]:
            given = f"dtype {self.dtype!r} with encoding {self.encoding!r}"
            raise TileSetError(f"partner {self.name!r}: {given} is not one of {sorted(allowed[self.kind])}")
        if self.kind == "vector":
            _check_int(self.length, f"partner {self.name!r}: length", 1, 1_000_000)
        else:
            _check_int(self.channels, f"partner {self.name!r}: channels", 1, MAX_CHANNELS)
            if self.size is not None:
                _check_int(self.size, f"partner {self.name!r}: size", 1, 16384)
        count = self.length if self.kind == "vector" else self.channels
        if any(not isinstance(n, str) for n in self.channel_names) or len(self.channel_names) not in (0, count):
            raise TileSetError(f"partner {self.name!r}: {len(self.channel_names)} channel names for {count} channels")
        _check_mpp(self.mpp, f"partner {self.name!r}", none=True)

    @property
    def stacked(self) -> bool:
        """True when the channels lie one below another in one tall grey image."""
        return self.kind != "vector" and self.channels not in (1, 3)


@dataclass(frozen=True)
class Spec:
    """What every tile of a set has in common. `params` is whatever made the set: hashed, and stored with each slide.

    A set of grids holds regions instead of tiles: `size` x `size` features of tiles, and in the last channel whether
    there is a tile (1) or background (0, with features of 0). `mpp` is um per cell then, so that size * mpp is the side
    of what a record shows, as of images.
    """

    name: str
    size: int
    mpp: float
    he_encoding: str = "jpeg"
    jpeg_quality: int = 90
    partners: tuple[Partner, ...] = ()
    label_names: tuple[str, ...] = ()
    params: dict = field(default_factory=dict)
    he_kind: str = "image"  # image | grid
    he_channels: int = 3  # of a grid: features of a tile, and the mask behind them

    def __post_init__(self):
        object.__setattr__(self, "partners", tuple(self.partners))
        object.__setattr__(self, "label_names", tuple(self.label_names))
        check_name(self.name, "a tile set", reserved=set())
        _check_int(self.size, "size (px)", 1, 16384)
        _check_int(self.jpeg_quality, "jpeg_quality", 1, 100)
        _check_mpp(self.mpp, "the tile set")
        self._check_he()
        names = [p.name for p in self.partners]
        if len(set(names)) != len(names):
            raise TileSetError(f"two partners have the same name: {names}")
        if any(not isinstance(n, str) or not n.isprintable() for n in self.label_names):
            raise TileSetError(f"label names are texts of one line, not {self.label_names!r}")
        if len(set(self.label_names)) != len(self.label_names):
            raise TileSetError(f"two label names are the same: {self.label_names}")
        for partner in self.partners:
            if partner.stacked and self.shape(partner)[0] * partner.channels > 65500:
                raise TileSetError(f"partner {partner.name!r}: the stacked channels are higher than 65500 px")
        try:
            json.dumps(self.params, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TileSetError(f"params hold what JSON can hold: {error}") from error

    def _check_he(self) -> None:
        if self.he_kind not in ENCODINGS:
            raise TileSetError(f"he_kind is {' or '.join(ENCODINGS)}, not {self.he_kind!r}")
        if self.he_encoding not in ENCODINGS[self.he_kind]:
            allowed = " or ".join(ENCODINGS[self.he_kind])
            raise TileSetError(f"he_encoding of a set of kind {self.he_kind} is {allowed}, not {self.he_encoding!r}")
        least, most = (3, 3) if self.he_kind == "image" else (2, MAX_FEATURES + 1)
        _check_int(self.he_channels, f"he_channels of a set of kind {self.he_kind}", least, most)
        if self.he_kind == "grid" and (wrong := [p.name for p in self.partners if p.kind != "vector"]):
            raise TileSetError(f"partners {wrong}: those of a grid are vectors, for it has no pixels")

    @property
    def he_shape(self) -> tuple[int, int, int]:
        return self.size, self.size, self.he_channels

    @property
    def he_dtype(self) -> str:
        return "uint8" if self.he_kind == "image" else "float16"

    def shape(self, partner: Partner) -> tuple[int, ...]:
        """[H, W, C] of an image or map, [length] of a vector."""
        if partner.kind == "vector":
            return (partner.length or 0,)
        side = partner.size or self.size
        return side, side, partner.channels

    def to_json(self) -> dict:
        """Of images without what they always are: their hashes are those of sets that knew no grids."""
        document = dataclasses.asdict(self)
        if self.he_kind == "image":
            del document["he_kind"], document["he_channels"]
        return document

    @staticmethod
    def from_json(document: Any) -> "Spec":
        try:
            partners = tuple(Partner(**p) for p in document["partners"])
            return Spec(**{**document, "partners": partners})
        except (TypeError, KeyError, AttributeError) as error:
            raise TileSetError(f"not a specification that this version reads: {error!r}") from error

    @property
    def sha256(self) -> str:
        return json_sha256(self.to_json())

    @property
    def params_sha256(self) -> str:
        return json_sha256(self.params)


@dataclass(frozen=True)
class Record:
    """One tile: `he` uint8 [H, W, 3], or a grid, float16 [H, W, C]; partners by name, None where absent; x, y the
    level-0 px of its corner."""

    he: np.ndarray
    partners: Mapping[str, np.ndarray | None] = field(default_factory=dict)
    x: float = math.nan
    y: float = math.nan
    mpp: float = math.nan
    label: int = -1  # -1: unknown
    columns: Mapping[str, float] = field(default_factory=dict)
    score: Mapping[str, float] = field(default_factory=dict)


def json_sha256(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_name(name: Any, what: str, reserved: set[str] = RESERVED) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise TileSetError(f"the name of {what} is lower case letters, digits and _, at most 32, not {name!r}")
    if name in reserved or (reserved and (name.startswith(("score_", "has_", "near_")) or name.endswith("_mask"))):
        raise TileSetError(f"the name of {what} is not one that the format uses itself: {name!r}")


def check_text_id(value: Any, what: str) -> None:
    """Refuse an id that could leave its folder or break a table; it is used in file names as it is."""
    if not isinstance(value, str) or not value or len(value.encode("utf-8", "replace")) > 180:
        raise TileSetError(f"{what} is a text of 1 to 180 bytes, not {value!r:.200}")
    if not value.isprintable() or "/" in value or "\\" in value or value.startswith(".") or value != value.strip():
        raise TileSetError(
            f"{what} {value!r} is refused: no '/', '\\' or control characters, no '.' in front, no spaces around; "
            "rename it in the table"
        )


def _check_int(value: Any, what: str, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise TileSetError(f"{what} is a whole number from {low} to {high}, not {value!r}")


def _check_mpp(mpp: Any, what: str, none: bool = False) -> None:
    if mpp is None and none:
        return
    if isinstance(mpp, bool) or not isinstance(mpp, (int, float)) or not 0.01 <= mpp <= 1000:
        raise TileSetError(f"{what}: mpp (um per pixel) is a number from 0.01 to 1000, not {mpp!r}")


def encode_record(spec: Spec, slide_id: str, case_id: str, record: Record) -> bytes:
    """The payload of one tile; refuses any shape, type or value that the specification does not announce."""
    unknown = set(record.partners) - {p.name for p in spec.partners}
    if unknown:
        raise TileSetError(f"partners {sorted(unknown)} are not in the specification")
    features: dict[str, tfrecord.Value] = {
        "he": _encode_he(spec, record.he),
        "slide_id": slide_id.encode(),
        "case_id": case_id.encode(),
        "x": float(record.x),
        "y": float(record.y),
        "mpp": float(record.mpp),
        "label": int(record.label),
    }
    for partner in spec.partners:
        features[partner.name] = encode_partner(spec, partner, record.partners.get(partner.name))
    return tfrecord.encode_example(features)


def _encode_he(spec: Spec, he: np.ndarray) -> bytes:
    if spec.he_kind == "image":
        return _encode_image(he, spec.he_shape, "uint8", spec.he_encoding, spec.jpeg_quality, "he")
    he = np.asarray(he)
    if he.shape != spec.he_shape or he.dtype != np.float16:
        raise TileSetError(f"he: float16 {spec.he_shape} is expected, not {he.dtype} {he.shape}")
    there = he[..., -1]
    if not np.isfinite(he).all() or not np.isin(there, (0, 1)).all() or he[there == 0].any():
        raise TileSetError("he: a grid is finite, its last channel is 0 or 1, and features are 0 where that is 0")
    return he.astype("<f2").tobytes()


def encode_partner(spec: Spec, partner: Partner, array: np.ndarray | None) -> tfrecord.Value:
    """bytes of an image, float32 values of a vector; an empty list where the partner is absent."""
    shape = spec.shape(partner)
    if partner.kind == "vector":
        if array is None:
            return np.zeros(0, np.float32)
        vector = np.asarray(array, np.float32)
        if vector.shape != shape or not np.isfinite(vector).all():
            raise TileSetError(f"{partner.name}: a vector of {shape[0]} finite values, not {vector.shape} or NaN")
        return vector
    if array is None:
        return []
    array = np.asarray(array)
    if array.ndim == 2:
        array = array[..., None]
    if partner.kind == "map" and array.dtype != np.uint16 and array.dtype.kind in "iub":
        if array.size and not 0 <= array.min() <= array.max() <= 65535:
            raise TileSetError(f"{partner.name}: a label map holds 0 to 65535, not {array.min()} to {array.max()}")
        array = array.astype(np.uint16)
    return _encode_image(array, shape, partner.dtype, partner.encoding, spec.jpeg_quality, partner.name)


def _encode_image(array: np.ndarray, shape: tuple, dtype: str, encoding: str, quality: int, name: str) -> bytes:
    array = np.asarray(array)
    if array.shape != shape or array.dtype != dtype:
        raise TileSetError(f"{name}: {dtype} {shape} is expected, not {array.dtype} {array.shape}")
    height, width, channels = shape
    if channels != 3:
        array = np.moveaxis(array, -1, 0).reshape(channels * height, width)
    array = np.ascontiguousarray(array)
    if encoding == "jpeg":  # the three channels of a partner may be three markers: their detail is not colour detail
        return bytes(imagecodecs.jpeg8_encode(array, level=quality, subsampling="420" if name == "he" else "444"))
    return png.encode(array)


def decode_image(
    data: bytes, shape: tuple[int, ...], dtype: str, encoding: str, into: np.ndarray | None = None
) -> np.ndarray:
    """[H, W, C]; a picture of another size or type is refused before memory is taken for it.

    With `into`, an array of that shape and dtype, the pixels are written there: a copy costs several percent of a
    stream. What is in it after an error is undefined.
    """
    height, width, channels = shape
    stored = (height, width, 3) if channels == 3 else (channels * height, width)
    direct = into is not None and channels in (1, 3) and into.flags.c_contiguous
    out = into.reshape(stored) if into is not None and direct else np.empty(stored, dtype)
    try:
        if encoding == "jpeg":
            if data[-2:] != b"\xff\xd9":
                raise ValueError("the JPEG has no end")
            imagecodecs.jpeg8_decode(data, out=out)
        else:
            png.decode(data, out)
    except (ValueError, RuntimeError) as error:
        raise TileSetError(f"not a {encoding} image of {dtype} {shape}: {error}") from error
    image = out if channels == 3 else np.moveaxis(out.reshape(channels, height, width), 0, -1)
    if into is None or direct:
        return image if into is None else into
    into[:] = image
    return into


def _decode_he(spec: Spec, data: bytes, into: np.ndarray | None) -> np.ndarray:
    if spec.he_kind == "image":
        return decode_image(data, spec.he_shape, "uint8", spec.he_encoding, into)
    if len(data) != 2 * math.prod(spec.he_shape):
        raise TileSetError(f"a grid of float16 {spec.he_shape} is expected, not {len(data)} bytes")
    grid = np.frombuffer(data, "<f2").reshape(spec.he_shape)
    if not np.isfinite(grid).all():
        raise TileSetError("the grid has values that are not finite")
    if into is None:
        return grid
    into[:] = grid
    return into


def decode_payload(
    spec: Spec, payload: bytes, into: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray | None]:
    """{'he': uint8 [H, W, 3] or float16 [H, W, C], partner: array or None}; TileSetError says which part is not as
    announced.

    `into` holds arrays by name that images are decoded into, where they are given.
    """
    into = into or {}
    try:
        features = tfrecord.decode_example(payload, {"he", *(p.name for p in spec.partners)})
    except tfrecord.RecordError as error:
        raise TileSetError(f"not an Example: {error}") from error
    name = "he"
    try:
        he = _only(features.get("he"))
        if he is None:
            raise TileSetError(f"there is no {spec.he_kind}")
        out: dict[str, np.ndarray | None] = {}
        out["he"] = _decode_he(spec, he, into.get("he"))
        for partner in spec.partners:
            name = partner.name
            out[name] = _decode_partner(spec, partner, features.get(name), into.get(name))
    except TileSetError as error:
        raise TileSetError(f"{name}: {error}") from error
    return out


def _decode_partner(
    spec: Spec, partner: Partner, value: tfrecord.Decoded | None, into: np.ndarray | None
) -> np.ndarray | None:
    if partner.kind != "vector":
        data = _only(value)
        return None if data is None else decode_image(data, spec.shape(partner), partner.dtype, partner.encoding, into)
    if not isinstance(value, np.ndarray) or value.dtype != np.float32:
        raise TileSetError("there is no list of floats")
    if not len(value):
        return None
    if value.shape != spec.shape(partner) or not np.isfinite(value).all():
        raise TileSetError(f"a vector of {spec.shape(partner)[0]} finite values is expected, not {len(value)} or NaN")
    return value


def _only(value: tfrecord.Decoded | None) -> bytes | None:
    if not isinstance(value, list) or len(value) > 1:
        raise TileSetError("there is no list of at most one image")
    return value[0] if value and value[0] else None
