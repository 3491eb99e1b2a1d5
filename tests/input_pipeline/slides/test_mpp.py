import math

import pytest

from input_pipeline.slides import mpp, omexml
from input_pipeline.slides.errors import SlideError
from input_pipeline.slides.mpp import Candidate, resolve


def found(source, x, y=None):
    return Candidate(source, x, x if y is None else y, f"the {source} field")


EVERYTHING = [found("tiff", 0.4), found("comment", 0.3), found("ome", 0.25), found("vendor", 0.2)]


@pytest.mark.parametrize(
    ("candidates", "user", "default", "expected"),
    [
        (EVERYTHING, 0.5, 0.6, (0.5, "user")),
        (EVERYTHING, None, 0.6, (0.2, "vendor")),
        (EVERYTHING[:3], None, 0.6, (0.25, "ome")),
        (EVERYTHING[:2], None, 0.6, (0.3, "comment")),
        (EVERYTHING[:1], None, 0.6, (0.4, "tiff")),
        ([], None, 0.6, (0.6, "default")),
        ([], None, None, (None, None)),
    ],
)
def test_the_order(candidates, user, default, expected):
    scale = resolve(candidates, user, default)
    assert (scale.mpp, scale.source) == expected
    assert bool(scale.reason) == (scale.mpp is None)


@pytest.mark.parametrize("value", [0.049, 10.1, 0.0, -0.5, math.nan, math.inf, 499.0])
def test_an_absurd_value_of_the_user_is_refused(value):
    with pytest.raises(SlideError, match=r"0\.05 to 10\.0, not"):
        resolve([], value)
    with pytest.raises(SlideError, match="default_mpp"):
        resolve([], None, value)


@pytest.mark.parametrize("source", ["vendor", "ome", "comment"])
def test_an_absurd_value_written_on_purpose_stops_the_search(source):
    scale = resolve([found(source, 499.0), found("tiff", 0.5)], None, 0.5)
    assert scale.mpp is None
    assert f"the {source} field says 499 x 499" in scale.reason


def test_an_untouched_72_dpi_gives_way_to_the_default_alone():
    candidates = mpp.tiff_resolution((72, 1), (72, 1), 2)
    assert "352.778" in resolve(candidates).reason
    assert resolve(candidates, None, 0.5) == mpp.Scale(0.5, "default")


@pytest.mark.parametrize(("y", "known"), [(0.5 * 1.019, True), (0.5 * 1.021, False), (1.0, False)])
def test_x_and_y_agree_within_two_percent(y, known):
    scale = resolve([found("vendor", 0.5, y)])
    assert (scale.mpp is not None) == known
    if known:
        assert scale.mpp == pytest.approx((0.5 + y) / 2)
    else:
        assert "differ by more than 2%" in scale.reason


def test_aperio():
    description = "Aperio Image Library v11\r\n46000x32914 (256x256) Q=30;x|AppMag = 20|MPP = 0.4990|Left = 25.6"
    assert [(c.x, c.y) for c in mpp.aperio(description)] == [(0.499, 0.499)]
    assert mpp.aperio("Aperio Image Library v11\r\n100x100|AppMag = 20") == []
    assert mpp.aperio("Aperio|MPP = none") == []


@pytest.mark.parametrize(
    ("unit", "expected"), [(None, 0.5), ("µm", 0.5), ("μm", 0.5), ("um", 0.5), ("mm", 500.0), ("nm", 0.0005)]
)
def test_ome_units(unit, expected):
    units = "" if unit is None else f' PhysicalSizeXUnit="{unit}" PhysicalSizeYUnit="{unit}"'
    text = f'<OME xmlns="http://x"><Image><Pixels PhysicalSizeX="0.5" PhysicalSizeY="0.5"{units}/></Image></OME>'
    (candidate,) = omexml.physical_size(text)
    assert (candidate.source, candidate.x, candidate.y) == ("ome", pytest.approx(expected), pytest.approx(expected))


def test_ome_without_a_length_says_nothing():
    pixel = '<OME><Image><Pixels PhysicalSizeX="1" PhysicalSizeY="1" PhysicalSizeXUnit="pixel"/></Image></OME>'
    assert omexml.physical_size(pixel) == []
    assert omexml.physical_size("<OME><Image><Pixels/></Image></OME>") == []
    assert omexml.physical_size("not xml") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("scanned at mpp = 0.25", (0.25, 0.25)),
        ('{"mpp_x": 0.25, "mpp_y": 0.251}', (0.25, 0.251)),
        ("MicronsPerPixel: 0.5", (0.5, 0.5)),
        ("openslide.mpp-x: .5\nopenslide.mpp-y: .5", (0.5, 0.5)),
        ("compress = 0.25", None),
        ("AppMag = 20", None),
    ],
)
def test_comments(text, expected):
    assert [(c.x, c.y) for c in mpp.comment(text)] == ([] if expected is None else [expected])


@pytest.mark.parametrize(
    ("unit", "per_unit", "expected"),
    [(3, (20000, 1), 0.5), (2, (50800, 1), 0.5), (None, (50800, 1), 0.5), (3, (4294967295, 213260), 0.49653)],
)
def test_tiff_resolution(unit, per_unit, expected):
    (candidate,) = mpp.tiff_resolution(per_unit, per_unit, unit)
    assert candidate.x == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("value", "unit"), [((20000, 1), 1), ((20000, 1), 0), ((20000, 0), 3), ((0, 1000), 3), (None, 3)]
)
def test_a_tiff_resolution_without_unit_or_value_says_nothing(value, unit):
    assert mpp.tiff_resolution(value, value, unit) == []


@pytest.mark.parametrize(
    ("unit", "per_unit", "expected"), [("micron", 2, 0.5), ("\\u00B5m", 4, 0.25), ("mm", 2000, 0.5)]
)
def test_imagej(unit, per_unit, expected):
    (candidate,) = mpp.imagej(f"ImageJ=1.54f\nimages=2\nunit={unit}\n", (per_unit, 1), (per_unit, 1))
    assert (candidate.source, candidate.x) == ("comment", pytest.approx(expected))
    assert mpp.imagej("ImageJ=1.54f\nunit=pixel\n", (1, 1), (1, 1)) == []
    assert mpp.imagej("unit=micron", (1, 1), (1, 1)) == []


def test_leica_and_philips():
    scn = (
        '<scn><collection><image><pixels sizeX="100" sizeY="50"/><view sizeX="50000" sizeY="25000"/></image>'
        '<image><pixels sizeX="7" sizeY="7"/><view sizeX="1" sizeY="1"/></image></collection></scn>'
    )
    assert [(c.x, c.y) for c in omexml.leica_size(scn, 100, 50)] == [(0.5, 0.5)]
    philips = '<DataObject><Attribute Name="DICOM_PIXEL_SPACING">"0.00025" "0.00026"</Attribute></DataObject>'
    (candidate,) = omexml.philips_size(philips)
    assert (candidate.x, candidate.y) == (pytest.approx(0.26), pytest.approx(0.25))


def test_no_entity_is_expanded():
    bomb = (
        '<!DOCTYPE l [<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;">]><OME><Image><Pixels PhysicalSizeX="&b;"/></Image></OME>'
    )
    with pytest.raises(SlideError, match="document type"):
        omexml.physical_size(bomb)
