"""Decoded tiles that a stream keeps: batches are as without, none is decoded twice, and none outlives the stream."""

import pytest

from input_pipeline.stream import fetching, train_stream
from input_pipeline.tileset.spec import decode_payload
from tests.input_pipeline.stream.fixtures import toy_fixture  # noqa: F401
from tests.input_pipeline.stream.test_stream import N_TRAIN, assert_same, take


@pytest.mark.parametrize("executor", ["threads", "tfdata"])
def test_tiles_kept_in_memory_change_nothing(toy, executor):
    options = {"executor": executor, "near_um": 15, "far_um": 25, "columns": ("depth",)}
    assert_same(take(toy.tileset(), 40, **options, keep=0), take(toy.tileset(), 40, **options))


def test_a_tile_beside_need_not_have_what_is_required_though_it_is_kept(toy):
    options = {"require": ("counts",), "on_bad": "replace", "near_um": 15}
    for seed in range(4):
        plain = take(toy.tileset(), 3, seed=seed, keep=0, **options)
        assert_same(plain, take(toy.tileset(), 3, seed=seed, **options))
        assert any(set(b["near_id"]) - set(b["id"]) for b in plain)


def test_no_tile_is_decoded_twice_where_all_fit_in_memory(toy, monkeypatch):
    decoded = []

    def counting(*arguments):
        decoded.append(1)
        return decode_payload(*arguments)

    monkeypatch.setattr(fetching, "decode_payload", counting)
    size = N_TRAIN * (16 * 16 * (3 + 4 * 2) + 8 * 8 * 2 + 5 * 4)
    for keep, count in ((size, N_TRAIN), (size - 1, 40 * 9)):
        decoded.clear()
        take(toy.tileset(), 40, batch=9, threads=1, prefetch=0, keep=keep)
        assert count <= len(decoded) <= count + (9 if keep < size else 0), "a chunk may be read ahead"


def test_kept_tiles_hold_nothing_but_themselves_and_go_with_the_stream(toy):
    with train_stream(toy.tileset(), batch=9, seed=3, executor="threads", threads=2) as stream:
        for _ in range(20):
            next(stream)
        kept = stream._plan.kept
        assert len(kept) == N_TRAIN
        assert all(part is None or part.base is None for images in kept.values() for part in images.values())
    assert not kept
