"""Sets of grids of tile features: written, opened, verified and streamed as sets of images are."""

from dataclasses import replace

import numpy as np
import pytest

from input_pipeline.audit import audit
from input_pipeline.stream import eval_stream, train_stream
from input_pipeline.tileset import Partner, Record, Spec, TileSet, TileSetError, finish, write_slide
from input_pipeline.tileset.spec import decode_payload, encode_record
from input_pipeline.tileset.verify import verify
from tests.input_pipeline.tileset import samples

SIDE, FEATURES = 4, 5
GENES = Partner("genes", "vector", dtype="float32", encoding="float32", length=3)
SPEC = Spec(
    "regions", SIDE, 128.0, "float16", partners=(GENES,), label_names=("no", "yes"), he_kind="grid", he_channels=6
)


def grid(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    there = rng.random((SIDE, SIDE, 1)) < 0.7
    return np.concatenate([rng.normal(size=(SIDE, SIDE, FEATURES)) * there, there], -1).astype(np.float16)


def record(seed: int) -> Record:
    genes = {"genes": np.full(3, seed, np.float32) if seed % 3 else None}
    return Record(grid(seed), genes, 2048.0 * seed, 0.0, 0.5, seed % 2, {"tiles": float(grid(seed)[..., -1].sum())})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("grids")
    for slide, case, seeds in (("a", "1", range(7)), ("b", "2", range(7, 7)), ("c", "2", range(7, 12))):
        write_slide(root, SPEC, slide, case, map(record, seeds))
    finish(root, SPEC, {"train": ["1"], "test": ["2"]})
    return root


def test_a_specification_of_images_has_the_hash_it_had_before_there_were_grids():
    assert samples.SPEC.sha256 == "3a29e6c2b1cae3a91f445fa76fff895e06fa1fca09d85bbbbda42a9600f4e6b6"
    before = {"name": "old", "size": 8, "mpp": 0.5, "he_encoding": "jpeg", "jpeg_quality": 90, "partners": []}
    before |= {"label_names": [], "params": {}}
    assert Spec.from_json(before) == Spec("old", 8, 0.5)
    assert Spec("old", 8, 0.5).to_json() == before | {"partners": (), "label_names": ()}
    assert Spec.from_json(SPEC.to_json()) == SPEC
    assert SPEC.sha256 != replace(SPEC, he_channels=7).sha256


def test_grids_come_back_bit_by_bit_and_the_set_is_whole(root):
    assert verify(root, deep=True) == []
    with TileSet.open(root) as tiles:
        assert tiles.spec == SPEC
        assert "float16" in tiles.manifest["layout"]
        for example in tiles.read(range(12)):
            found = tiles.decode(example)["he"]
            assert found.dtype == np.float16
            assert found.tobytes() == grid(example.id).tobytes()


@pytest.mark.filterwarnings("ignore")
def test_tfds_opens_it(root):
    tfds = pytest.importorskip("tensorflow_datasets")
    found = list(tfds.builder_from_directory(root).as_dataset(split="all").as_numpy_iterator())
    assert [f["slide_id"] for f in found] == [b"a"] * 7 + [b"c"] * 5
    for i, one in enumerate(found):
        assert one["he"].dtype == np.float16
        np.testing.assert_array_equal(one["he"], grid(i))


@pytest.mark.parametrize("executor", ["threads", "processes", "tfdata"])
def test_streams_of_every_executor_hold_what_was_written(root, executor):
    with TileSet.open(root) as tiles:
        options = {"executor": executor, "threads": 2, "columns": ("tiles",)}
        with train_stream(tiles, batch=4, seed=1, near_um=1500, far_um=3000, **options) as stream:
            batches = [next(stream) for _ in range(4)]
            state = stream.state()
            after = next(stream)
        for batch in batches:
            assert batch["he"].dtype == np.float16
            np.testing.assert_array_equal(batch["he"], np.stack([grid(i) for i in batch["id"]]))
            np.testing.assert_array_equal(batch["genes_mask"], batch["id"] % 3 > 0)
            np.testing.assert_array_equal(batch["tiles"], batch["he"][..., -1].sum((1, 2)))
            for beside, least, most in (("near", 1, 1), ("far", 3, 6)):
                np.testing.assert_array_equal(batch[f"{beside}_he"], np.stack([grid(i) for i in batch[f"{beside}_id"]]))
                apart = np.abs(batch[f"{beside}_id"] - batch["id"])[batch[f"{beside}_mask"]]
                assert ((apart >= least) & (apart <= most)).all()
        with train_stream(tiles, batch=4, seed=1, near_um=1500, far_um=3000, state=state, **options) as stream:
            resumed = next(stream)
        assert all(np.array_equal(resumed[name], after[name]) for name in after)
        with eval_stream(tiles, batch=8, executor=executor, threads=1) as stream:
            seen = np.concatenate([b["id"][b["mask"]] for b in stream])
        np.testing.assert_array_equal(seen, np.arange(12))


def test_a_grid_that_is_not_finite_on_disk_is_a_bad_tile(tmp_path, monkeypatch):
    bad = grid(3)
    bad[0, 0] = np.nan
    with monkeypatch.context() as patch:
        patch.setattr("input_pipeline.tileset.spec._encode_he", lambda spec, he: he.astype("<f2").tobytes())
        spoilt = [replace(record(i), he=bad) if i == 3 else record(i) for i in range(6)]
        write_slide(tmp_path, SPEC, "a", "1", spoilt)
    finish(tmp_path, SPEC)
    assert any("tile 3" in fault and "not finite" in fault for fault in verify(tmp_path, deep=True))
    with TileSet.open(tmp_path) as tiles:
        with (
            train_stream(tiles, batch=6, seed=0, executor="threads") as stream,
            pytest.raises(TileSetError, match="slide 'a': he: the grid has values that are not finite"),
        ):
            next(stream)
        with train_stream(tiles, batch=6, seed=0, executor="threads", on_bad="replace") as stream:
            batch = next(stream)
        assert 3 not in batch["id"]
        np.testing.assert_array_equal(batch["he"], np.stack([grid(i) for i in batch["id"]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g[:3], r"float16 \(4, 4, 6\) is expected"),
        (lambda g: g.astype(np.float32), "is expected, not float32"),
        (lambda g: np.where(np.arange(6) == 5, 0.5, g).astype(np.float16), "last channel is 0 or 1"),
        (lambda g: np.where(np.arange(6) == 5, 0, g + 1).astype(np.float16), "features are 0 where"),
        (lambda g: g + np.float16(np.inf), "a grid is finite"),
    ],
)
def test_what_is_no_grid_is_not_written(change, message):
    with pytest.raises(TileSetError, match=message):
        encode_record(SPEC, "a", "1", Record(change(grid(0))))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"he_kind": "cube"}, "he_kind is image or grid"),
        ({"he_encoding": "jpeg"}, "of a set of kind grid is float16"),
        ({"he_kind": "image"}, "of a set of kind image is jpeg or png"),
        ({"he_channels": 1}, "he_channels of a set of kind grid"),
        ({"partners": (Partner("ihc", "image", 3),)}, r"partners \['ihc'\]: those of a grid are vectors"),
    ],
)
def test_what_is_no_set_of_grids_is_refused(changed, message):
    with pytest.raises(TileSetError, match=message):
        replace(SPEC, **changed)
    with pytest.raises(TileSetError, match="he_channels of a set of kind image"):
        Spec("x", 8, 0.5, he_channels=4)


def test_a_payload_of_another_length_is_refused():
    payload = encode_record(SPEC, "a", "1", record(1))
    with pytest.raises(TileSetError, match="he: a grid of float16"):
        decode_payload(replace(SPEC, he_channels=7), payload)


def test_regions_are_audited_by_name_and_not_by_pixel(root):
    with TileSet.open(root) as tiles:
        assert audit(tiles, tiles=False) == []
        with pytest.raises(ValueError, match="regions have no pixels"):
            audit(tiles, progress=False)
