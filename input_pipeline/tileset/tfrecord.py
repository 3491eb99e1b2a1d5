"""TFRecord framing and the tf.train.Example message, by hand, so that no reader or writer needs tensorflow.

A record is: length (uint64), masked crc32c of the length, payload, masked crc32c of the payload; little endian.
Bytes from outside are data: whatever is malformed raises RecordError, and no length is believed before it is checked.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import BinaryIO

import google_crc32c
import numpy as np

HEADER = 12
FOOTER = 4
MAX_PAYLOAD = 2**31 - 1  # lengths are int32 in the index

Value = bytes | Sequence[bytes] | int | float | np.ndarray
Decoded = list[bytes] | np.ndarray


class RecordError(ValueError):
    """Bytes that are not what a TFRecord of Examples holds."""


def masked_crc(data: bytes | memoryview) -> int:
    crc = google_crc32c.value(bytes(data))
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame_header(length: int) -> bytes:
    packed = struct.pack("<Q", length)
    return packed + struct.pack("<I", masked_crc(packed))


def write_record(file: BinaryIO, payload: bytes) -> int:
    """Append one record and return the masked crc of its payload."""
    if len(payload) > MAX_PAYLOAD:
        raise RecordError(f"a record of {len(payload)} bytes is longer than the {MAX_PAYLOAD} that an index can hold")
    crc = masked_crc(payload)
    file.write(b"".join((frame_header(len(payload)), payload, struct.pack("<I", crc))))
    return crc


def check_record(data: bytes, length: int) -> tuple[bytes, int]:
    """The payload and its stored crc, from the bytes of one whole record whose length is known from elsewhere."""
    if len(data) != HEADER + length + FOOTER:
        raise RecordError(f"{len(data)} bytes are left where a record of {HEADER + length + FOOTER} should be")
    if data[:HEADER] != frame_header(length):
        raise RecordError(f"the length field does not say {length}, or its checksum is wrong")
    payload = data[HEADER:-FOOTER]
    (stored,) = struct.unpack("<I", data[-FOOTER:])
    if masked_crc(payload) != stored:
        raise RecordError("the payload does not match its checksum")
    return payload, stored


def scan(file: BinaryIO, size: int) -> Iterator[tuple[int, bytes, int]]:
    """(offset, payload, crc) of every record of a file of `size` bytes; an error names the first bad offset."""
    offset = 0
    while offset < size:
        header = file.read(HEADER)
        if len(header) < HEADER:
            raise RecordError(f"offset {offset}: the file ends inside a record header")
        (length,) = struct.unpack_from("<Q", header)
        if frame_header(length) != header:
            raise RecordError(f"offset {offset}: the length field does not match its checksum")
        if length > min(MAX_PAYLOAD, size - offset - HEADER - FOOTER):
            raise RecordError(f"offset {offset}: a record of {length} bytes does not fit in the {size - offset} left")
        try:
            payload, crc = check_record(header + file.read(length + FOOTER), length)
        except RecordError as error:
            raise RecordError(f"offset {offset}: {error}") from None
        yield offset, payload, crc
        offset += HEADER + length + FOOTER


def _varint(value: int) -> bytes:
    value &= 0xFFFFFFFFFFFFFFFF
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _message(field: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return b"".join((bytes((field << 3 | 2,)), _varint(len(body)), body))


def _encode_value(key: str, value: Value) -> bytes:
    if isinstance(value, bytes):
        return _message(1, _message(1, value))
    if isinstance(value, (int, np.integer)):
        return _message(3, _message(1, _varint(int(value))))
    if isinstance(value, (float, np.floating)):
        return _message(2, _message(1, struct.pack("<f", value)))
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind == "f":
        return _message(2, _message(1, np.ascontiguousarray(value, "<f4").tobytes()) if len(value) else b"")
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu":
        return _message(3, _message(1, b"".join(_varint(int(v)) for v in value)) if len(value) else b"")
    if isinstance(value, (list, tuple)) and all(isinstance(v, bytes) for v in value):
        return _message(1, *(_message(1, v) for v in value))
    raise RecordError(f"feature {key!r}: an Example holds bytes, a number or a 1-d array of numbers, not {type(value)}")


def encode_example(features: Mapping[str, Value]) -> bytes:
    """A serialised tf.train.Example; keys in the order given, so equal input gives equal bytes."""
    entries = (_message(1, _message(1, k.encode()), _message(2, _encode_value(k, v))) for k, v in features.items())
    return _message(1, *entries)


def _read_varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise RecordError("a varint runs past the end of its message")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise RecordError("a varint is longer than ten bytes")


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, wire type, start, stop) of each field; a varint field spans its own bytes."""
    while at < end:
        tag = data[at]
        at += 1
        if tag > 0x7F:
            tag, at = _read_varint(data, at - 1, end)
        wire = tag & 7
        if wire == 2:
            length = data[at] if at < end else 0x80
            at += 1
            if length > 0x7F:
                length, at = _read_varint(data, at - 1, end)
            stop = at + length
        elif wire == 0:
            _, stop = _read_varint(data, at, end)
        elif wire == 5 or wire == 1:
            stop = at + (4 if wire == 5 else 8)
        else:
            raise RecordError(f"wire type {wire} is not one of a protocol buffer")
        if stop > end:
            raise RecordError(f"a field of {stop - at} bytes does not fit in the {end - at} left")
        if tag < 8:
            raise RecordError("field number 0 is not allowed")
        yield tag >> 3, wire, at, stop
        at = stop


def _decode_ints(data: bytes, parts: list[tuple[int, int]]) -> np.ndarray:
    values = []
    for at, stop in parts:
        while at < stop:
            value, at = _read_varint(data, at, stop)
            values.append(value)
    return np.array(values, np.uint64).view(np.int64)


def _decode_value(data: bytes, at: int, end: int) -> Decoded | None:
    """One Feature; the last kind set wins, as in a oneof, and its repeated parts concatenate."""
    kind = 0
    parts: list[tuple[int, int]] = []
    for field, wire, start, stop in _fields(data, at, end):
        if field not in (1, 2, 3):
            continue
        if wire != 2:
            raise RecordError(f"a feature list has wire type 2, not {wire}")
        if field != kind:
            kind, parts = field, []
        for inner, inner_wire, a, b in _fields(data, start, stop):
            if inner == 1:
                if inner_wire not in ((2,), (2, 5), (2, 0))[kind - 1]:
                    raise RecordError(f"wire type {inner_wire} does not occur in this kind of list")
                parts.append((a, b))
    if kind == 0:
        return None
    if kind == 1:
        return [data[a:b] for a, b in parts]
    if kind == 3:
        return _decode_ints(data, parts)
    floats = b"".join(data[a:b] for a, b in parts)
    if len(floats) % 4:
        raise RecordError(f"{len(floats)} bytes are not a whole number of floats")
    return np.frombuffer(floats, "<f4")


def decode_example(data: bytes, only: Set[str] | None = None) -> dict[str, Decoded]:
    """Feature name -> list of bytes, float32 array or int64 array; a feature with no list set is left out.

    With `only`, values of other names are stepped over, and what follows the last of these names is not looked at:
    reading what a stream does not use would slow it down. `verify` looks at all.
    """
    features: dict[str, Decoded] = {}
    for field, wire, start, stop in _fields(data, 0, len(data)):
        if field != 1 or wire != 2:
            continue
        for inner, inner_wire, a, b in _fields(data, start, stop):
            if inner == 1 and inner_wire == 2:
                _decode_entry(data, a, b, features, only)
                if only is not None and len(features) == len(only):
                    return features
    return features


def _decode_entry(data: bytes, at: int, end: int, features: dict[str, Decoded], only: Set[str] | None) -> None:
    name, place = b"", (0, 0)
    for field, wire, start, stop in _fields(data, at, end):
        if wire == 2 and field == 1:
            name = data[start:stop]
        elif wire == 2 and field == 2:
            place = (start, stop)
    try:
        key = name.decode()
    except UnicodeDecodeError:
        raise RecordError(f"a feature name is not UTF-8: {name[:40]!r}") from None
    if key in features:
        raise RecordError(f"the feature {key!r} stands there twice")
    if only is None or key in only:
        value = _decode_value(data, *place)
        if value is not None:
            features[key] = value
