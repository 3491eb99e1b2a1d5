import tracemalloc

import numpy as np
import pytest
import tifffile

from input_pipeline import annotations


def test_cells_are_counted_once_on_a_grid_as_brute_force_counts_them(tmp_path):
    rng = np.random.default_rng(0)
    xy, positive = rng.uniform(0, 100, (500, 2)), rng.integers(0, 2, 500)
    xy[:5] = [[10, 10], [20, 20], [0, 0], [10, 35], [99.9, 99.9]]  # corners of tiles and of the slide
    path = tmp_path / "cells.csv"
    rows = "\n".join(f"{i},{x},{y},{p}" for i, ((x, y), p) in enumerate(zip(xy, positive, strict=True)))
    path.write_text(f"id,x_um,y_um,positive\n{rows}\n")
    corners = np.array([(x, y) for y in range(0, 100, 10) for x in range(0, 100, 10)], float)
    found = annotations.cell_columns(path, corners, 10.0)
    for corner, count, share in zip(corners, found["cells"], found["positive"], strict=True):
        inside = ((xy >= corner) & (xy < corner + 10)).all(axis=1)
        assert count == inside.sum()
        np.testing.assert_allclose(share, positive[inside].mean() if inside.any() else np.nan)
    assert found["cells"].sum() == 500


def test_no_cells_at_all(tmp_path):
    path = tmp_path / "cells.csv"
    path.write_text("x_um,y_um,positive\n")
    found = annotations.cell_columns(path, np.zeros((2, 2)), 10.0)
    assert found["cells"].tolist() == [0, 0]
    assert np.isnan(found["positive"]).all()


def test_the_commonest_region_of_a_tile_and_its_share(tmp_path):
    labels = np.zeros((20, 20), np.uint16)
    labels[:, 10:] = 3
    path = tmp_path / "regions.ome.tif"
    tifffile.imwrite(path, labels, metadata={"axes": "YX", "PhysicalSizeX": 4.0, "PhysicalSizeY": 4.0})
    corners = np.array([[0.0, 0.0], [20.0, 0.0], [40.0, 40.0]])
    found = annotations.region_columns(path, corners, 40.0)
    assert found["region"].tolist() == [0, 0, 3]
    np.testing.assert_allclose(found["region_share"], [1.0, 0.5, 1.0])


def test_a_region_map_of_colours_is_refused(tmp_path):
    path = tmp_path / "regions.ome.tif"
    tifffile.imwrite(path, np.zeros((20, 20, 3), np.uint8), metadata={"PhysicalSizeX": 4.0, "PhysicalSizeY": 4.0})
    with pytest.raises(ValueError, match="one channel"):
        annotations.region_columns(path, np.zeros((1, 2)), 40.0)


def test_a_cell_of_unknown_stain_spoils_no_other_tile(tmp_path):
    path = tmp_path / "cells.csv"
    path.write_text("x_um,y_um,positive\n1,1,nan\n2,1,1\n3,1,0\n11,1,1\n21,1,\n31,1,0\n")
    corners = np.array([[0.0, 0.0], [10.0, 0.0], [20.0, 0.0], [30.0, 0.0]])
    found = annotations.cell_columns(path, corners, 10.0)
    assert found["cells"].tolist() == [3, 1, 1, 1]
    np.testing.assert_array_equal(found["positive"], [0.5, 1.0, np.nan, 0.0])


@pytest.mark.parametrize("value", ["2", "-1", "inf"])
def test_a_stain_that_is_no_share_is_refused(tmp_path, value):
    path = tmp_path / "cells.csv"
    path.write_text(f"x_um,y_um,positive\n1,1,1\n2,1,{value}\n")
    with pytest.raises(ValueError, match="positive is 0 to 1"):
        annotations.cell_columns(path, np.zeros((1, 2)), 10.0)


def test_a_long_table_is_never_in_memory_as_text(tmp_path):
    path = tmp_path / "cells.csv"
    with open(path, "w") as file:
        file.write("id,x_um,y_um,type,positive\n")
        file.writelines(f"{i},{i % 977}.25,{i % 1009}.5,lymphocyte,{i % 2}\n" for i in range(60_000))
    tracemalloc.start()
    table = annotations.read_table(path, ("x_um", "y_um"), optional=("positive",))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(table["x_um"]) == 60_000
    assert table["y_um"][59_999] == 59_999 % 1009 + 0.5
    assert peak < 16e6  # all of it as lists of strings is 25 MB


def test_spots_in_a_tile_are_summed_and_text_columns_left_out(tmp_path):
    path = tmp_path / "spots.tsv"
    path.write_text("spot\tx_um\ty_um\tCD8A\tACTB\na\t5\t5\t1\t2\nb\t6\t6\t3\t4\nc\t25\t5\t7\t8\n")
    assert annotations.spot_genes(path) == ("CD8A", "ACTB")
    table = annotations.SpotTable(path, ("ACTB", "CD8A"))
    assert table.vector(np.array([0.0, 0.0]), 10.0).tolist() == [6, 4]
    assert table.vector(np.array([10.0, 0.0]), 10.0) is None
    assert table.vector(np.array([20.0, 0.0]), 10.0).tolist() == [8, 7]
    assert table.vector(np.array([20.0, 0.0]), 10.0).dtype == np.float32


@pytest.mark.parametrize("chunk", [annotations.CHUNK, 20])
def test_vectors_are_those_of_brute_force(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(annotations, "CHUNK", chunk)  # fields: many chunks of a few rows
    rng = np.random.default_rng(0)
    xy, counts = rng.uniform(0, 100, (300, 2)), rng.poisson(2, (300, 5))
    xy[:4] = [[10, 10], [20, 20], [0, 0], [10, 35]]  # corners of tiles
    path = tmp_path / "spots.csv"
    rows = np.concatenate([xy, counts], axis=1)
    path.write_text("x_um,y_um,a,b,c,d,e\n" + "".join(",".join(map(repr, r)) + "\n" for r in rows.tolist()))
    table = annotations.SpotTable(path, ("e", "b"))
    held = 0
    for corner in ((x, y) for y in range(0, 100, 5) for x in range(0, 100, 5)):
        inside = ((xy >= corner) & (xy < np.add(corner, 5))).all(axis=1)
        vector = table.vector(np.array(corner, float), 5.0)
        held += inside.sum()
        if inside.any():
            np.testing.assert_array_equal(vector, counts[inside][:, [4, 1]].sum(axis=0))
        else:
            assert vector is None
    assert held == 300


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x_um,y_um\n1,2\n", "no column of numbers"),
        ("x_um,gene\n1,2\n", "lacks the columns"),
        ("x_um,y_um,gene\n1,2,3\n4,5\n", "row 3: 2 fields"),
        ("x_um,y_um,gene\n1,2,nan\n", "not finite"),
        ("x_um,y_um,gene\n1,2,-3\n", "not negative"),
        ("x_um,y_um,gene\n1,2,3\n4,5,many\n", "no number"),
    ],
)
def test_a_wrong_table_of_spots_is_refused(tmp_path, text, message):
    path = tmp_path / "spots.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        annotations.SpotTable(path, annotations.spot_genes(path))
