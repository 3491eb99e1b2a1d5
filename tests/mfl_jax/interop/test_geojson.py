import itertools
import json
import uuid

import numpy as np
import pytest

from mfl_jax.interop import geojson

CORNERS = np.array([[0, 0], [512, 0], [512, 1024]])
SCORE = np.array([0.25, np.nan, -1.0])


def written(path, **options):
    given = {"classes": ["tumour", "</script>", "tumour"], "colours": {"tumour": (200, 0, 10)}, "name": "attention"}
    geojson.write_tiles(path, CORNERS, 512, {"score": SCORE, "rank": np.arange(3)}, **given | options)
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def test_tiles_are_detections_with_closed_rings(tmp_path):
    found = written(tmp_path / "a.geojson")
    assert found["type"] == "FeatureCollection"
    assert len(found["features"]) == 3
    for feature, (x, y) in zip(found["features"], CORNERS.tolist(), strict=True):
        assert str(uuid.UUID(feature["id"])) == feature["id"]
        assert (feature["type"], feature["geometry"]["type"]) == ("Feature", "Polygon")
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1] == [x, y]
        assert sorted(ring[:-1]) == [[x, y], [x, y + 512], [x + 512, y], [x + 512, y + 512]]
        assert abs(sum(a[0] * b[1] - b[0] * a[1] for a, b in itertools.pairwise(ring))) / 2 == 512**2
        assert (feature["properties"]["objectType"], feature["properties"]["name"]) == ("detection", "attention")
    first, second, third = (f["properties"] for f in found["features"])
    assert first["classification"] == {"name": "tumour", "color": [200, 0, 10]}
    assert second["classification"] == {"name": "</script>"}
    assert (first["measurements"], third["measurements"]) == (
        {"score": 0.25, "rank": 0.0},
        {"score": -1.0, "rank": 2.0},
    )
    assert second["measurements"] == {"rank": 1.0}
    assert len({f["id"] for f in found["features"]}) == 3


def test_the_same_result_is_the_same_file_and_the_origin_is_subtracted(tmp_path):
    written(tmp_path / "a.geojson")
    written(tmp_path / "b.geojson")
    assert (tmp_path / "a.geojson").read_bytes() == (tmp_path / "b.geojson").read_bytes()
    moved = written(tmp_path / "c.geojson", origin=(100, 10.5))
    assert moved["features"][1]["geometry"]["coordinates"][0][0] == [412, -10.5]


def test_no_tiles_and_no_classes(tmp_path):
    geojson.write_tiles(tmp_path / "a.geojson", np.zeros((0, 2)), 512, {})
    assert json.loads((tmp_path / "a.geojson").read_text()) == {"type": "FeatureCollection", "features": []}
    assert "classification" not in written(tmp_path / "b.geojson", classes=None)["features"][0]["properties"]


def test_wrong_values_are_refused_and_leave_no_file(tmp_path):
    path = tmp_path / "a.geojson"
    with pytest.raises(ValueError, match=r"there are 3 tiles, and \{'score': 2\} values"):
        geojson.write_tiles(path, CORNERS, 512, {"score": np.zeros(2)})
    with pytest.raises(ValueError, match="corners are finite numbers"):
        geojson.write_tiles(path, np.full((2, 2), np.nan), 512, {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        geojson.write_tiles(path, CORNERS, 512, {"score": np.array([1.0, np.inf, 0.0])})
    assert not list(tmp_path.iterdir())


def test_where_qupath_counts_from(tmp_path):
    assert geojson.slide_origin("any.mrxs", "image") == (0.0, 0.0)
    with pytest.raises(ValueError, match="the origin is one of image, bounds, not 'corner'"):
        geojson.slide_origin("any.mrxs", "corner")
    pytest.importorskip("openslide")
    (tmp_path / "a.mrxs").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="OpenSlide cannot say where its bounds are"):
        geojson.slide_origin(tmp_path / "a.mrxs", "bounds")
