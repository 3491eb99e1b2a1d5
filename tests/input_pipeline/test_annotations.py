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


def test_spots_in_a_tile_are_summed_and_text_columns_left_out(tmp_path):
    path = tmp_path / "spots.tsv"
    path.write_text("spot\tx_um\ty_um\tCD8A\tACTB\na\t5\t5\t1\t2\nb\t6\t6\t3\t4\nc\t25\t5\t7\t8\n")
    assert annotations.spot_genes(path) == ("CD8A", "ACTB")
    vectors = annotations.spot_vectors(path, np.array([[0.0, 0.0], [10.0, 0.0], [20.0, 0.0]]), 10.0, ("ACTB", "CD8A"))
    np.testing.assert_array_equal(vectors, [[6, 4], [np.nan, np.nan], [8, 7]])


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
        annotations.spot_vectors(path, np.zeros((1, 2)), 10.0, annotations.spot_genes(path))
