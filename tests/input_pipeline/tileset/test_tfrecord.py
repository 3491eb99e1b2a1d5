import io
import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from input_pipeline.tileset import tfrecord
from input_pipeline.tileset.tfrecord import RecordError, decode_example, encode_example, scan, write_record

FEATURES = {
    "he": b"\x00\xffpicture" * 40,
    "absent": [],
    "two": [b"a", b""],
    "label": -1,
    "x": 1.5,
    "vector": np.array([1.0, -2.5, 3.25], np.float32),
    "empty": np.zeros(0, np.float32),
    "numbers": np.array([0, 1, 300, -(2**63), 2**63 - 1], np.int64),
    "naïve": b"",
}


def same(found, expected) -> bool:
    if isinstance(expected, np.ndarray):
        return isinstance(found, np.ndarray) and found.dtype == expected.dtype and np.array_equal(found, expected)
    return found == expected


def as_decoded(value):
    if isinstance(value, bytes):
        return [value]
    if isinstance(value, int):
        return np.array([value], np.int64)
    if isinstance(value, float):
        return np.array([value], np.float32)
    return value


@pytest.mark.filterwarnings("ignore")
def test_tensorflow_reads_what_we_write_and_we_read_what_it_writes(tmp_path):
    tf = pytest.importorskip("tensorflow")
    path = tmp_path / "a.tfrecord"
    with open(path, "wb") as file:
        for i in range(3):
            write_record(file, encode_example(FEATURES | {"label": i}))
    parsed = {
        "he": tf.io.FixedLenFeature((), tf.string),
        "absent": tf.io.VarLenFeature(tf.string),
        "two": tf.io.FixedLenFeature((2,), tf.string),
        "label": tf.io.FixedLenFeature((), tf.int64),
        "x": tf.io.FixedLenFeature((), tf.float32),
        "vector": tf.io.FixedLenFeature((3,), tf.float32),
        "empty": tf.io.VarLenFeature(tf.float32),
        "numbers": tf.io.FixedLenFeature((5,), tf.int64),
        "naïve": tf.io.FixedLenFeature((), tf.string),
    }
    examples = [tf.io.parse_single_example(raw, parsed) for raw in tf.data.TFRecordDataset(str(path))]
    assert [int(e["label"]) for e in examples] == [0, 1, 2]
    for name, value in FEATURES.items():
        found = examples[0][name]
        found = (tf.sparse.to_dense(found) if isinstance(found, tf.SparseTensor) else found).numpy()
        assert name == "label" or np.array_equal(found, value)

    message = tf.train.Example()
    message.ParseFromString(encode_example(FEATURES))
    theirs = message.SerializeToString()
    with tf.io.TFRecordWriter(str(tmp_path / "b.tfrecord")) as writer:
        writer.write(theirs)
    with open(tmp_path / "b.tfrecord", "rb") as file:
        ((offset, payload, _),) = scan(file, (tmp_path / "b.tfrecord").stat().st_size)
    assert offset == 0
    assert payload == theirs
    decoded = decode_example(theirs)
    assert all(same(decoded[k], as_decoded(v)) for k, v in FEATURES.items() if k not in ("absent", "empty"))


VALUES = st.one_of(
    st.binary(max_size=300),
    st.lists(st.binary(max_size=20), max_size=3),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(width=32, allow_nan=False),
)


@given(st.dictionaries(st.text(max_size=200), VALUES, max_size=6))
@settings(max_examples=100, deadline=None)
def test_what_was_encoded_comes_back(features):
    decoded = decode_example(encode_example(features))
    assert list(decoded) == list(features)
    assert all(same(decoded[k], as_decoded(v)) for k, v in features.items())


@given(st.dictionaries(st.text(max_size=20), VALUES, max_size=6), st.sets(st.text(max_size=20), max_size=3))
@settings(max_examples=100, deadline=None)
def test_of_what_was_encoded_those_asked_for_come_back(features, others):
    asked = {*list(features)[::2], *others}
    decoded = decode_example(encode_example(features), asked)
    assert list(decoded) == [name for name in features if name in asked]
    assert all(same(decoded[k], as_decoded(features[k])) for k in decoded)


def test_a_feature_that_stands_there_twice_is_refused():
    one = encode_example({"he": b"pixels"})[2:]
    with pytest.raises(RecordError, match="'he' stands there twice"):
        decode_example(b"\x0a" + bytes([2 * len(one)]) + one + one)


def test_nothing_is_read_behind_the_last_name_asked_for():
    whole = encode_example({"he": b"pixels", "x": 1.5})
    at = whole.rindex(b"\x0a\x01x")
    broken = whole[:at] + b"\x0b" + whole[at + 1 :]  # a wire type that there is none of
    assert decode_example(broken, {"he"}) == {"he": [b"pixels"]}
    with pytest.raises(RecordError):
        decode_example(broken)


def test_fields_unknown_to_us_are_passed_over_and_unpacked_numbers_are_read():
    unknown = b"\x2a\x03xyz" + b"\x30\x05" + b"\x3d\x00\x00\x00\x00" + b"\x41" + bytes(8)
    floats = b"\x12\x0a\x0d\x00\x00\x80\x3f\x0d\x00\x00\x00\x40"  # 1.0, 2.0, each with its own tag
    ints = b"\x1a\x04\x08\x07\x08\x08"
    entries = b""
    for key, value in ((b"f", floats), (b"i", ints)):
        entry = b"\x0a\x01" + key + b"\x12" + bytes([len(value)]) + value
        entries += b"\x0a" + bytes([len(entry)]) + entry
    decoded = decode_example(unknown + b"\x0a" + bytes([len(entries)]) + entries + unknown)
    assert decoded["f"].tolist() == [1.0, 2.0]
    assert decoded["i"].tolist() == [7, 8]


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_decode_or_are_refused(data):
    try:
        decoded = decode_example(data)
    except RecordError:
        return
    assert all(isinstance(v, (list, np.ndarray)) for v in decoded.values())


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_example_decodes_or_is_refused(data):
    payload = bytearray(encode_example(FEATURES))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(payload)))
    with suppress(RecordError):
        decode_example(bytes(payload[:cut]))


def test_every_flipped_bit_of_a_record_is_found():
    file = io.BytesIO()
    write_record(file, encode_example({"label": 3, "he": b"abc"}))
    whole = file.getvalue()
    assert len(list(scan(io.BytesIO(whole), len(whole)))) == 1
    for bit in range(8 * len(whole)):
        bad = bytearray(whole)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RecordError):
            list(scan(io.BytesIO(bad), len(bad)))
        with pytest.raises(RecordError):
            tfrecord.check_record(bytes(bad), len(whole) - 16)


@given(st.binary(max_size=120), st.integers(0, 120))
@settings(max_examples=200, deadline=None)
def test_any_file_scans_or_is_refused(tail, cut):
    file = io.BytesIO()
    write_record(file, b"payload")
    data = (file.getvalue() + tail)[:cut]
    try:
        found = list(scan(io.BytesIO(data), len(data)))
    except RecordError:
        return
    assert all(data[o + 12 : o + 12 + len(p)] == p for o, p, _ in found)


def test_a_length_that_claims_more_than_the_file_is_refused_before_it_is_read():
    class Watched(io.BytesIO):
        def read(self, size=-1):
            assert size <= 12
            return super().read(size)

    data = tfrecord.frame_header(2**40) + bytes(100)
    with pytest.raises(RecordError, match="does not fit"):
        list(scan(Watched(data), len(data)))


def test_a_deeply_wrong_varint_and_wire_type_are_refused():
    for data, what in ((b"\xff" * 20, "varint"), (b"\x0b", "wire type 3"), (b"\x02\x01a", "field number 0")):
        with pytest.raises(RecordError, match=what):
            decode_example(data)
    bad_floats = b"\x0a\x0c\x0a\x0a\x0a\x01v\x12\x05\x12\x03\x0a\x01z"
    with pytest.raises(RecordError, match="whole number of floats"):
        decode_example(bad_floats)


def test_values_that_an_example_cannot_hold_are_refused():
    for value in (np.zeros((2, 2), np.float32), "text", {"a": 1}, None):
        with pytest.raises(RecordError, match="feature 'k'"):
            encode_example({"k": value})


def test_the_mask_of_the_checksum_is_that_of_the_format():
    assert tfrecord.masked_crc(b"") == 0xA282EAD8
    assert struct.unpack("<I", tfrecord.frame_header(0)[8:])[0] == tfrecord.masked_crc(bytes(8))
