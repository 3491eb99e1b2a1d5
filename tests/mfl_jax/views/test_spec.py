"""The spec language: what it accepts, what it says when it does not."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfl_jax import views
from mfl_jax.views import KINDS, parse, parse_many
from mfl_jax.views.spec import ViewError

FULL = (
    "crop(.6,1)|flip|rot90|rotate(20)|jitter(.4,.4,.4,.1,p=.8)|hed(.05)|gray(.2)|blur(.1,2,p=.5)|solarise(p=.2)"
    "|noise(.02)|cutout(.2)|normalise"
)


def test_the_canonical_string_writes_out_every_argument_and_reads_back_as_the_same_view():
    view = parse(FULL, size=64)
    assert str(view) == (
        "crop(0.6,1,1.3333333333333333)|flip(0.5)|rot90|rotate(20,1)|size(64)|jitter(0.4,0.4,0.4,0.1,0.8,0)"
        "|hed(0.05,p=1)|gray(0.2)|blur(0.1,2,0.5)|solarise(0.2,0.5)|noise(0.02,1)|cutout(0.2,1)"
        "|normalise(0.485-0.456-0.406,0.229-0.224-0.225)"
    )
    assert parse(str(view)) == view
    assert hash(parse(str(view))) == hash(view)


def test_spelling_does_not_matter():
    assert parse("crop( .60,max=1 ) |size(8)| blur(max=2,min=.1)") == parse("crop(6e-1)|size(8)|blur(.1)")
    assert parse("crop(.6)|size(8)") != parse("crop(.6)|size(9)")
    assert parse("crop(.6)|blur|size(8)", size=9) == parse("size(8)|crop(.6)|blur") == parse("crop(.6)|blur", size=8)


def test_lists_are_joined_by_minus_signs_also_around_exponents():
    view = parse("normalise(1e-1-.2-3e-1,.5)", size=8)
    assert view.calls[-1].args == {"mean": (0.1, 0.2, 0.3), "std": (0.5,)}
    assert parse("scale(4095-1e4,10-0)", size=8, channels=2).calls[-1].args == {"white": (4095, 1e4), "black": (10, 0)}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("crop(.6,1)|filp", r"unknown op 'filp'; did you mean 'flip'\?(.|\n)*\^ position 11$"),
        ("crop(2)", r"min=2 is out of range; allowed: numbers in \[0.001, 1\]\n.*\n +\^ position 5$"),
        ("flip|crop(.2,-.5)", r"max=-0.5 is out of range; allowed: numbers in \[0.001, 1\]\n.*\n +\^ position 13$"),
        ("crop(.6,.5)", r"min=0.6 is above max=0.5"),
        ("blur(3,2)", r"min=3 is not below max=2"),
        ("jitter(.4,hew=.1)", r"no argument 'hew'; did you mean 'hue'\?(.|\n)*\^ position 10$"),
        ("jitter(p=.4,.1)", r"a value without a name follows a named one"),
        ("jitter(.4,brightness=.1)", r"'brightness' is given twice"),
        ("flip(.5,.5)", r"takes at most 1 arguments. It is flip\(p=0.5\)"),
        ("rot90(1)", r"takes at most 0 arguments. It is rot90, no arguments"),
        ("flip(.5-.6)", r"p is one number, not '.5-.6'"),
        ("hed(nan)", r"alpha is not 'nan'; allowed: numbers in \[0, 1\]"),
        ("hed(inf)", r"alpha is not 'inf'"),
        ("size(8.5)", r"pixels=8.5 is out of range; allowed: integers in \[1, 4096\]"),
        ("crop(.6,1", r"'crop' is followed by '\(.6,1'"),
        ("crop(.6,1))", r"max is not '1\)'"),
        ("flip||hed", r"an op is a name(.|\n)*\^ position 5$"),
        ("", r"an op is a name"),
        ("onehot(3)", r"'onehot' is an op of map views, and this is a view of kind 'image'"),
        ("hed|flip", r"'flip' \(position 4 .* is of stage geometry and cannot follow augment"),
        ("normalise|hed", r"'hed' .* cannot follow normalise"),
        ("size(8)|flip|size(9)", r"'size' can be given once"),
        ("normalise(.5)", r"mean and std go together"),
        ("normalise(.1-.2,.3)", r"mean has 2 values for 3 channels; give 1 or 3"),
        ("scale(4095,4095)", r"black is not below white"),
        ("scale(1-2-3,0-0)", r"black names 2 channels and white 3"),
    ],
)
def test_a_fault_is_named_with_its_place_and_what_is_allowed(spec, said):
    with pytest.raises(ViewError, match=said):
        parse(spec, size=8)


def test_channels_kind_and_size_are_checked_before_anything_is_traced():
    with pytest.raises(ValueError, match=r"'hed' is for 3 channels \(RGB\); this view has 5"):
        parse("hed", size=8, channels=5)
    with pytest.raises(ValueError, match=r"'normalise' of 5 channels needs mean and std"):
        parse("normalise", size=8, channels=5)
    with pytest.raises(ValueError, match=r"has no size: give size= or add \|size\(pixels\)"):
        parse("flip")
    with pytest.raises(ValueError, match=r"ends in one or more of onehot"):
        parse("flip", size=8, kind="map", channels=1)
    with pytest.raises(ValueError, match=r"'boundary' reads channel 1 of a map that has 1"):
        parse("boundary(1)", size=8, kind="map", channels=1)
    with pytest.raises(ValueError, match=r"kind is one of image, map, vector, grid, not 'maps'; did you mean 'map'\?"):
        parse("flip", size=8, kind="maps")
    with pytest.raises(ValueError, match=r"std above 0"):
        parse("normalise", size=8, mean=0.5, std=0.0)


def test_statistics_of_the_data_set_are_written_into_the_view():
    view = parse("normalise", size=8, mean=(0.7, 0.5, 0.6), std=(0.2, 0.3, 0.2))
    assert str(view) == "size(8)|normalise(0.7-0.5-0.6,0.2-0.3-0.2)"
    assert parse(str(view)) == view
    assert str(parse("normalise(.5,.25)", size=8, mean=0.1, std=0.1)) == "size(8)|normalise(0.5,0.25)"


def test_many_views_round_trip_and_are_counted():
    many = parse_many("2*crop(.4,1)|flip; 8 * crop(.05,.4)|size(96)", size=224)
    assert len(many) == 10
    assert [view.size for view in many.each()] == [224] * 2 + [96] * 8
    assert parse_many(str(many)) == many
    with pytest.raises(ValueError, match=r"taken 1 to 256 times, not 0: '0\*flip'"):
        parse_many("0*flip", size=8)


def test_a_fault_in_a_plan_names_the_modality():
    of = {"he": views.Modality(size=8), "if": views.Modality(channels=4, size=8)}
    with pytest.raises(ValueError, match=r"views of 'if': 'hed' is for 3 channels"):
        views.plan({"he": "hed", "if": "hed"}, of)
    with pytest.raises(ValueError, match=r"views are given for 'iff', which is none of he, if; did you mean 'if'\?"):
        views.plan({"iff": "flip"}, of)
    with pytest.raises(ValueError, match=r"the same geometric ops in view 0 of all modalities; 'he' has 'crop"):
        views.plan({"he": "crop(.5)|flip", "if": "flip"}, of)
    views.plan({"he": "crop(.5)|flip", "if": "flip"}, of, paired_geometry=False)


def value_of(arg):
    if arg.integer:
        one = st.integers(int(arg.low), int(arg.high)).map(str)
    else:
        one = st.floats(arg.low, arg.high, allow_nan=False).map(repr)
    return one


@st.composite
def call_texts(draw, name, op):
    given_args = draw(st.lists(st.sampled_from(op.args), unique=True)) if op.args else []
    return f"{name}({','.join(f'{arg.name}={draw(value_of(arg))}' for arg in given_args)})"


@pytest.mark.parametrize("name", list(KINDS["image"]))
def test_whatever_parses_reads_back_from_its_canonical_string(name):
    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(call_texts(name, KINDS["image"][name]))
    def check(text):
        try:
            view = parse(text, size=8)
        except ViewError:
            return
        assert parse(str(view)) == view
        assert str(parse(str(view))) == str(view)

    check()


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.text("croplifp(),.1=-|x ;*e9\n", max_size=30))
def test_no_text_ends_in_anything_but_a_view_or_a_view_error(text):
    with contextlib.suppress(ViewError):
        parse_many(text, size=8)
