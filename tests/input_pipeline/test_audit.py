import tracemalloc

import imagecodecs
import numpy as np
import pytest
from scipy import ndimage

from input_pipeline import audit as module
from input_pipeline.audit import ORIENTATIONS, alike, area_means, audit, fingerprint, nearest, oriented, turned
from input_pipeline.phantom import draw_slide, paint
from input_pipeline.tileset import Record, Spec, TileSet, finish, write_slide

SIZE = 96
SPEC = Spec("tiles", SIZE, 0.5)


@pytest.fixture(scope="module")
def pictures():
    return [paint(draw_slide(seed, size=1024)) for seed in (11, 12, 13)]


def cut(picture, step=SIZE, start=0):
    last = len(picture) - SIZE + 1
    return [picture[y : y + SIZE, x : x + SIZE] for y in range(start, last, step) for x in range(start, last, step)]


def tile_set(root, slides, splits=None):
    """slides: {slide_id: (case_id, tiles)} or {slide_id: (case_id, tiles, source)}."""
    for slide, (case, tiles, *source) in slides.items():
        write_slide(root, SPEC, slide, case, [Record(tile) for tile in tiles], *source)
    cases = sorted({case for case, *_ in slides.values()})
    finish(root, SPEC, splits or {"train": cases})
    return TileSet.open(root)


def found(*sets, **options):
    return audit(*sets, progress=False, **options)


def test_different_slides_share_nothing(tmp_path, pictures):
    a = tile_set(tmp_path / "a", {"s0": ("c0", cut(pictures[0])), "s1": ("c1", cut(pictures[1]))})
    b = tile_set(tmp_path / "b", {"s2": ("c2", cut(pictures[2]))})
    assert found(a, b) == []


def test_neighbours_that_overlap_by_half_are_not_duplicates(tmp_path, pictures):
    a = tile_set(tmp_path / "a", {"s0": ("c0", cut(pictures[0]))})
    b = tile_set(tmp_path / "b", {"s1": ("c1", cut(pictures[0], start=SIZE // 2))})
    assert found(a, b) == []


def test_a_shared_case_slide_and_source_file_are_named(tmp_path, pictures):
    tiles = cut(pictures[0])
    digest = "ab" * 32
    a = {
        "s0": ("TCGA-01", tiles[:3], {"he": "x.svs", "bytes": 17}),
        "s1": ("c1", tiles[3:6], {"files": {"sha256": digest}}),
        "s2": ("c2", tiles[6:9], {"params_sha256": "cd" * 32}),
    }
    b = {
        "s3": ("tcga-01", tiles[9:12], {"he": "x.svs", "bytes": 17}),
        "s4": ("c4", tiles[12:15], {"he_sha256": digest.upper()}),
        "S2": ("c5", tiles[15:18], {"params_sha256": "cd" * 32}),
    }
    findings = found(tile_set(tmp_path / "a", a), tile_set(tmp_path / "b", b), tiles=False)
    assert [(f.kind, f.count, f.examples) for f in findings] == [
        ("case", 1, ("TCGA-01",)),
        ("slide", 1, ("s2",)),
        ("source", 2, ("s0 = s3", "s1 = s4")),
    ]
    assert "share 2 source files: s0 = s3; s1 = s4" in str(findings[2])


def changes(tile, number):
    """JPEG at a low quality, one of eight orientations, brightness, contrast and tint."""
    rng = np.random.default_rng(number)
    transpose, up_down, left_right = ORIENTATIONS[number % 8]
    tile = tile.transpose(1, 0, 2) if transpose else tile
    tile = tile[::-1] if up_down else tile
    tile = tile[:, ::-1] if left_right else tile
    tile = tile * rng.uniform(0.9, 1.05) * rng.uniform(0.97, 1.03, 3) + rng.uniform(-6, 6)
    tile = np.ascontiguousarray(np.clip(tile, 0, 255).round().astype(np.uint8))
    return imagecodecs.jpeg_decode(imagecodecs.jpeg_encode(tile, level=50))


def test_planted_duplicates_are_found_and_nothing_else(tmp_path, pictures):
    tiles = cut(pictures[0])
    marked = [i for i, tile in enumerate(tiles) if tile.mean(axis=2).std() > 12]
    planted = marked[:: len(marked) // 24][:24]
    copies = [changes(tiles[i], number) for number, i in enumerate(planted)]
    a = tile_set(tmp_path / "a", {"s0": ("c0", tiles)})
    b = tile_set(tmp_path / "b", {"s1": ("c1", cut(pictures[1]) + copies)})
    (finding,) = found(a, b, examples=100)
    first = len(cut(pictures[1]))
    expected = {f"tile {i} of s0 = tile {first + number} of s1" for number, i in enumerate(planted)}
    assert finding.kind == "tile"
    assert finding.complete
    assert set(finding.examples) <= expected, "each is found at its own place"
    assert finding.count == len(finding.examples) >= 23


def test_splits_of_one_set(tmp_path, pictures):
    tiles = cut(pictures[0])
    marked = [tile for tile in tiles if tile.mean(axis=2).std() > 12]
    slides = {
        "s0": ("c0", tiles),
        "s1": ("c1", cut(pictures[1])),
        "s2": ("c2", [*cut(pictures[2]), changes(marked[5], 3), changes(marked[9], 6)]),
    }
    a = tile_set(tmp_path / "a", slides, {"train": ["c0"], "val": ["c1"], "test": ["c2"]})
    (finding,) = found(a)
    assert (finding.kind, set(finding.where), finding.count) == ("tile", {"train", "test"}, 2)
    clean = tile_set(tmp_path / "b", slides, {"train": ["c0", "c2"], "val": ["c1"]})
    assert found(clean) == []


def test_blank_tiles_are_no_duplicates(tmp_path, pictures):
    rng = np.random.default_rng(0)
    glass = [np.clip(rng.normal(242, 2, (SIZE, SIZE, 3)), 0, 255).round().astype(np.uint8) for _ in range(40)]
    white = [np.full((SIZE, SIZE, 3), 255, np.uint8)] * 5
    shade = [np.full((SIZE, SIZE, 3), 240, np.uint8) - np.arange(0, 5, 5 / SIZE).astype(np.uint8)[:, None]] * 5
    a = tile_set(tmp_path / "a", {"s0": ("c0", [*glass, *white, *shade, *cut(pictures[0])[40:45]])})
    b = tile_set(tmp_path / "b", {"s1": ("c1", [*glass, *white, *shade, *cut(pictures[1])[40:45]])})
    assert found(a, b) == []


def test_edges_of_tissue_at_the_same_place_are_no_duplicates(tmp_path):
    rng = np.random.default_rng(1)

    def edge():
        tile = np.full((SIZE, SIZE, 3), 240.0)
        tile[:, : SIZE // 2] = 140
        return (tile + rng.normal(0, 8, tile.shape)).clip(0, 255).round().astype(np.uint8)

    a = tile_set(tmp_path / "a", {"s0": ("c0", [edge() for _ in range(20)])})
    b = tile_set(tmp_path / "b", {"s1": ("c1", [edge() for _ in range(20)])})
    assert found(a, b) == []


def test_alike_needs_the_whole_and_the_detail():
    rng = np.random.default_rng(0)
    step = np.where(np.arange(SIZE) < SIZE // 2, 140.0, 240.0) * np.ones((SIZE, 1))
    one, two = (ndimage.gaussian_filter(rng.normal(size=(SIZE, SIZE)), 1.5) * 30 for _ in range(2))
    assert alike(one, one * 0.7 + 20)
    assert not alike(step + one, step + two), "an edge at the same place"
    assert not alike(step + one, step.T + one), "the same grain on another ground"


def test_a_long_comparison_stops_and_says_so(tmp_path, pictures):
    marked = [tile for tile in cut(pictures[0]) if tile.mean(axis=2).std() > 12][:12]
    a = tile_set(tmp_path / "a", {"s0": ("c0", marked)})
    b = tile_set(tmp_path / "b", {"s1": ("c1", marked)})
    (whole,) = found(a, b, examples=3)
    assert whole.count == 12
    assert "share 12 near-duplicate tiles" in str(whole)
    assert "and 9 more" in str(whole)
    (part,) = found(a, b, most_checked=5)
    assert part.count == 5
    assert not part.complete
    assert "at least 5" in str(part)
    (none,) = found(a, b, most_checked=0)
    assert (none.kind, none.count, none.complete) == ("tile", 0, False)
    assert "may share near-duplicate tiles: only 0 of 12 likely pairs were compared" in str(none)


def test_a_partner_file_is_a_source_and_an_aid_is_none(tmp_path, pictures):
    tiles = cut(pictures[0])
    source = {
        "files": {"he": {"sha256": "ab" * 32}, "if": {"sha256": "cd" * 32}},
        "aids": {"cells": {"sha256": "ef" * 32}},
    }
    other = {"files": {"he": {"sha256": "12" * 32}, "if": {"sha256": "cd" * 32}}, "aids": source["aids"]}
    a = tile_set(tmp_path / "a", {"s0": ("c0", tiles[:3], source)})
    b = tile_set(tmp_path / "b", {"s1": ("c1", tiles[3:6], other)})
    (finding,) = found(a, b, tiles=False)
    assert (finding.kind, finding.count) == ("source", 1)
    other["files"]["if"] = {"sha256": "34" * 32}
    c = tile_set(tmp_path / "c", {"s1": ("c1", tiles[3:6], other)})
    assert found(a, c, tiles=False) == []


def test_a_broken_tile_is_an_error_not_a_gap(tmp_path, pictures):
    a = tile_set(tmp_path / "a", {"s0": ("c0", cut(pictures[0])[:4])})
    b = tile_set(tmp_path / "b", {"s1": ("c1", cut(pictures[1])[:4])})
    shard = next(b.root.glob("*.tfrecord*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="slide 's1'"):
        found(a, TileSet.open(b.root))


def test_refusals(tmp_path, pictures, monkeypatch):
    a = tile_set(tmp_path / "a", {"s0": ("c0", cut(pictures[0])[:2])})
    with pytest.raises(ValueError, match="two splits or more"):
        found(a)
    monkeypatch.setattr(module, "MIN_SIZE", 200)
    with pytest.raises(ValueError, match="too small"):
        found(a, a)
    assert {f.kind for f in found(a, a, tiles=False)} == {"case", "slide"}


def test_area_means_against_an_enlarged_image():
    image = np.random.default_rng(0).normal(size=(2, 30, 30))
    large = image.repeat(7, axis=1).repeat(7, axis=2)
    assert np.allclose(area_means(image, 7), large.reshape(2, 7, 30, 7, 30).mean(axis=(2, 4)), atol=1e-5)
    assert np.allclose(area_means(image, 30), image, atol=1e-5)


@pytest.mark.parametrize("size", [16, 33, 96, 224])
def test_turning_the_fingerprint_is_turning_the_tile(size):
    tiles = np.random.default_rng(size).normal(128, 60, (6, size, size)).astype(np.float32)
    bits, contrast = fingerprint(tiles)
    assert (contrast > 0).all()
    for how in ORIENTATIONS:
        other, _ = fingerprint(np.stack([oriented(tile, *how) for tile in tiles]))
        assert np.array_equal(turned(bits, *how), other), how
    assert len({int(v) for how in ORIENTATIONS for v in turned(bits[:1], *how)}) == 8
    brighter, _ = fingerprint(tiles * 0.8 + 30)
    assert np.array_equal(brighter, bits)


def test_the_search_against_every_pair():
    rng = np.random.default_rng(0)
    ones = rng.integers(0, 2**63, 3000, np.uint64) << np.uint64(1)
    twos = rng.integers(0, 2**63, 800, np.uint64) << np.uint64(1)
    for k in range(400):
        flips = rng.choice(np.arange(1, 64), k % 13, replace=False)
        changed = ones[k] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64), initial=np.uint64(0))
        twos[k] = turned(np.array([changed]), *ORIENTATIONS[k % 8])[0]
    every = np.stack([np.bitwise_count(ones[:, None] ^ turned(twos, *how)) for how in ORIENTATIONS])
    best = every.min(axis=(0, 1))
    row, orientation, distance = nearest(ones, twos)
    hit = np.flatnonzero(row >= 0)
    assert np.array_equal(every[orientation[hit], row[hit], hit], distance[hit])
    assert (distance[hit] <= module.MAX_BITS).all()
    assert set(np.flatnonzero(best <= 3)) <= set(hit.tolist())
    assert np.array_equal(distance[best <= 3], best[best <= 3])
    assert np.mean(row[best <= 6] >= 0) > 0.75
    assert not (row[best > module.MAX_BITS] >= 0).any()


@pytest.mark.slow
def test_a_million_tiles_a_side_in_bounded_memory():
    rng = np.random.default_rng(0)
    ones, twos = (rng.integers(0, 2**63, 10**6, np.uint64) << np.uint64(1) for _ in range(2))
    twos[:1000] = ones[5000:6000]
    tracemalloc.start()
    row, _, distance = nearest(ones, twos)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(row[:1000], np.arange(5000, 6000))
    assert (distance[:1000] == 0).all()
    assert peak < 400e6
