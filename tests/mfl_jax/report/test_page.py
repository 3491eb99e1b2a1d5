import copy
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from mfl_jax import report
from mfl_jax.report import ReportError
from mfl_jax.report.schema import SCHEMA
from mfl_jax.report.style import CSS
from tests.mfl_jax.report import synthetic

HOSTILE = '<img src=x onerror="a()"> & </style><script>b()</script>'


@pytest.fixture(scope="module")
def pictures():
    return synthetic.pictures()


def parse(page: str) -> ElementTree.Element:
    assert page.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(page.split("\n", 1)[1])


def sections(root) -> list[str]:
    return [section.get("id") for section in root.iter("section")]


def test_sections_come_in_the_order_of_a_reader(pictures):
    root = parse(report.render(synthetic.results(), pictures))
    expected = ["pairs", "views", "curves", "results", "figures", "labels", "projections", "saliency", "neighbours"]
    assert sections(root) == [*expected, "ledger", "reliability", "howto", "config"]
    assert [a.get("href") for a in root.iter("a")] == [f"#{name}" for name in sections(root)]
    assert root.find("body/main/h1").text == synthetic.results()["title"]
    assert root.find("body/main/p[@class='answer']").text == synthetic.results()["answer"]


def test_nothing_is_fetched_and_every_picture_has_words(pictures):
    page = report.render(synthetic.results(), pictures)
    assert set(re.findall(r"https?://[^\"']*", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"url\(|@import|<link|<script", page)
    images = list(parse(page).iter("img"))
    assert len(images) == len(pictures)
    for image in images:
        assert image.get("src").startswith("data:image/jpeg;base64,")
        assert image.get("alt").strip()
        assert int(image.get("width")) > 0


def test_no_section_but_the_arms_is_needed(pictures):
    needed = {key for key in SCHEMA if not key.endswith("?")}
    results = {key: value for key, value in synthetic.results().items() if key in needed}
    assert sections(parse(report.render(results, {}))) == ["results"]


@pytest.mark.parametrize("key", [key.rstrip("?") for key in SCHEMA if key.endswith("?") and key != "skipped?"])
def test_each_optional_part_can_be_absent(key, pictures):
    results = synthetic.results(points=5)
    dropped = json.dumps(results.pop(key))
    kept = {name: picture for name, picture in pictures.items() if f'"picture": "{name}"' not in dropped}
    parse(report.render(results, kept))


def test_a_skipped_section_says_why():
    results = synthetic.results(points=5)
    for key in ("saliency", "pairs", "registration", "views", "neighbours", "figures"):
        del results[key]
    results["skipped"] = {"saliency": "the model <has> no maps"}
    root = parse(report.render(results, {}))
    section = next(s for s in root.iter("section") if s.get("id") == "saliency")
    assert "Left out: the model <has> no maps" in "".join(section.itertext())


def hostile(value):
    """Every free text with markup behind it; names that must agree with others still do."""
    if isinstance(value, dict):
        return {k: v if k in ("kind", "by", "better", "picture") else hostile(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(v) for v in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) else value


def test_every_name_is_escaped(pictures):
    root = parse(report.render(hostile(synthetic.results(points=5)), pictures))
    assert not list(root.iter("script"))
    assert len(list(root.iter("img"))) == len(pictures)
    assert "".join(root.itertext()).count(HOSTILE) > 50


def test_undefined_figures_are_said_and_never_printed_as_such(pictures):
    results = synthetic.results(points=5)
    for arm in results["arms"]:
        arm["metrics"] = {key: {"mean": None} for key in arm["metrics"]}
    for run in results["curves"]:
        run["y"] = [None] * len(run["y"])
    page = report.render(results, pictures)
    assert not re.search(r"\bnan\b|\bNone\b", re.sub(r"base64,[^\"]*", "", page))
    assert "not defined" in page


def test_pictures_and_results_must_match(pictures):
    with pytest.raises(ReportError, match="there is no picture 'pairs'; there are: neighbours, reg0"):
        report.render(synthetic.results(points=5), {k: v for k, v in pictures.items() if k != "pairs"})
    with pytest.raises(ReportError, match="that nothing in the results names: more"):
        report.render(synthetic.results(points=5), {**pictures, "more": pictures["pairs"]})


def test_the_file_is_bounded_and_small_pictures_keep_their_quality(pictures, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)
    large = dict.fromkeys(pictures, noise) | {"reg0": pictures["reg0"]}
    path = report.write(tmp_path / "report.html", synthetic.results(points=5), large)
    assert 2_000_000 < path.stat().st_size < 8_000_000
    images = list(parse(path.read_text()).iter("img"))
    height, width, _ = pictures["reg0"].shape
    assert (str(width), str(height)) in [(image.get("width"), image.get("height")) for image in images]


def test_a_fault_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("earlier")
    with pytest.raises(ReportError):
        report.write(path, {"title": "x"})
    assert path.read_text() == "earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_same_results_same_bytes(pictures):
    results = synthetic.results(points=5)
    assert report.render(results, pictures) == report.render(copy.deepcopy(results), pictures)


def test_the_record_makes_the_report_again(pictures, tmp_path):
    results = synthetic.results(points=5)
    path = report.save(tmp_path, results, pictures)
    first = path.read_bytes()
    assert json.loads((tmp_path / "results.json").read_text()) == results
    path.unlink()
    (tmp_path / "pictures" / "of_another_run.jpg").write_bytes(b"no matter")
    assert report.remake(tmp_path).read_bytes() == first
    (tmp_path / "pictures" / "views.jpg").unlink()
    with pytest.raises(ReportError, match="there is no picture 'views'"):
        report.remake(tmp_path)


def test_a_picture_stays_in_its_folder(tmp_path):
    with pytest.raises(ValueError, match="a picture's name is a file's name"):
        report.save(tmp_path, synthetic.results(points=5), {"../x": b""})


def test_colours_of_text_can_be_read_in_light_and_dark():
    """Contrast by the formula of WCAG 2: at least 4.5."""
    for block in re.findall(r":root \{([^}]*)\}", CSS):
        colours = dict(re.findall(r"--(\w+): ?#(\w+);", block))
        assert len(colours) >= 18
        for name in ("ink", "soft", "link", *(f"c{i}" for i in range(8))):
            assert contrast(colours[name], colours["ground"]) >= 4.5, name


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    full = colour if len(colour) == 6 else "".join(2 * letter for letter in colour)
    parts = [int(full[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_refused_pair_is_said_to_be_and_is_in_no_figure(pictures):
    results = synthetic.results(points=5)
    results["registration"][0] |= {"passed": False, "error_um": 418.0}
    section = next(s for s in parse(report.render(results, pictures)).iter("section") if s.get("id") == "pairs")
    text = "".join(section.itertext())
    kept = [item["error_um"] for item in results["registration"] if item["passed"]]
    assert f"{len(results['registration'])} pairs, 2 refused. Error of those kept" in text
    assert f"largest {max(kept):.1f} µm" in text
    first, second = (f"{item['slide']}, if: " for item in results["registration"][:2])
    assert first + "refused" in text
    assert second + "registered" in text
