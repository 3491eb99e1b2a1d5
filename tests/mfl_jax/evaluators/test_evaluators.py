"""Evaluators as the training loop sees them, on a small tile set on disk."""

from dataclasses import replace

import numpy as np
import pytest
from ml_collections import ConfigDict

from input_pipeline.tileset import Partner, Record, Spec, finish, write_slide
from mfl_jax import config as configs
from mfl_jax import evaluators, sharding
from mfl_jax.data import Facts
from mfl_jax.evaluators.embed import colour_statistics
from mfl_jax.methods.base import Method
from mfl_jax.step import State
from mfl_jax.views import Modality

SIZE = 8
SPEC = Spec(
    "small",
    SIZE,
    0.5,
    he_encoding="png",
    partners=(Partner("if", "image", channels=1, dtype="uint8", encoding="png", channel_names=("MARKER",)),),
    label_names=("no", "yes"),
)


def records(rng, count: int):
    """What is labelled is darker, and the marker is the darkness."""
    for i in range(count):
        label = int(rng.integers(0, 2))
        he = rng.integers(120 - 60 * label, 250 - 60 * label, (SIZE, SIZE, 3), np.uint8)
        marker = (255 - he.mean(-1, keepdims=True)).astype(np.uint8)
        place = (i * 10.0, 0.0, 0.5)
        yield Record(he, {"if": marker}, *place, label=label, columns={"dark": float(255 - he.mean())}, score={})


@pytest.fixture(scope="module", name="root")
def root_fixture(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("small") / "set", np.random.default_rng(0)
    for i in range(9):
        write_slide(root, SPEC, f"s{i}", f"c{i}", list(records(rng, 14)), {})
    splits = {"train": ["c0", "c1", "c2", "c3"], "val": ["c4", "c5"], "test": ["c6", "c7", "c8"]}
    finish(root, SPEC, splits=splits)
    return root


def part(root, what: str, **changed) -> dict:
    common = {"kind": what, "every": 10, "tileset": str(root), "batch": 32, "feature": "he", "partners": ()}
    common |= {"pretrained": "train", "transductive": False, "resamples": 50}
    if what == "decode":
        common |= {"decoded": ("if",)}
    elif what == "distance_ratio":
        common |= {"near_um": 11.0, "far_um": 30.0}
    elif what == "batch_effect":
        del common["pretrained"], common["transductive"]
    else:
        common |= {"target": "label", "threshold": None, "regression": False}
    return common | changed


def build(parts: dict, size: int = SIZE, trained: tuple[str, ...] = ()):
    reading = configs.Reading(ConfigDict(parts))
    facts = Facts(size, 0.5, {"he": Modality()}, {}, SPEC.label_names, 1, trained)
    made = evaluators.make(reading, facts, sharding.make_mesh())
    reading.check_all_read()
    return {e.name: e for e in made}


def method(calls: list) -> Method:
    def embed(params, extra, batch):
        calls.append(sorted(batch))
        return colour_statistics(params, extra, batch)

    return Method(None, None, None, embed)


def state(step: int) -> State:
    return State(np.int32(step), {}, {}, {}, None, None, None)


def test_every_kind_reports_on_one_shared_pass(root):
    parts = {kind: part(root, kind) for kind in evaluators.KINDS}
    parts["dark"] = part(root, "probe", target="dark", regression=True)
    parts["split"] = part(root, "probe", target="dark", threshold=100.0)
    made = build(parts)
    calls: list = []
    of = method(calls)
    found = {name: e(of, state(10)) for name, e in made.items()}
    assert calls == [["he", "mask"]]  # traced once, on H&E alone
    assert all(np.isfinite(v) for values in found.values() for v in values.values())
    assert all(key.startswith(f"{name}/") for name, values in found.items() for key in values)
    assert found["probe"]["probe/auc"] > 0.95
    assert found["knn"]["knn/auc"] > 0.95
    assert found["paper_head"]["paper_head/auc"] > 0.9
    assert found["few_label"]["few_label/auc_100pc_cases"] > 0.95
    assert found["dark"]["dark/r2"] > 0.95
    assert found["decode"]["decode/r2/if/MARKER/mean"] > 0.95
    assert found["batch_effect"]["batch_effect/nearest"] < 0.5
    assert found["retrieval"]["retrieval/recall_1"] > 0.95
    assert found["clusters"]["clusters/purity"] > 0.95
    assert 0.5 < found["distance_ratio"]["distance_ratio/addr_global"] < 2
    assert made["probe"](of, state(20)) == made["probe"](of, state(20))


def test_another_state_is_embedded_anew(root):
    """At the same step, of the same method: as when one program trains several seeds."""
    (evaluator,) = build({"probe": part(root, "probe")}).values()
    of = Method(None, None, None, lambda p, e, b: {"he": p["on"] * colour_statistics(p, e, b)["he"]})
    auc = [evaluator(of, replace(state(1), params={"on": np.float32(on)}))["probe/auc"] for on in (1, 0, 1)]
    assert auc[0] == auc[2] > 0.95
    assert auc[1] == 0.5


def test_a_transductive_figure_is_marked(root):
    (marked,) = build({"mine": part(root, "probe", pretrained="test", transductive=True)}).values()
    (plain,) = build({"mine": part(root, "probe")}).values()
    assert marked(method([]), state(0))["mine/transductive"] == 1
    assert "mine/transductive" not in plain(method([]), state(0))


@pytest.mark.parametrize("kind", ["probe", "decode"])
def test_cases_that_the_run_is_trained_on_count_whatever_the_config_names(root, kind):
    """The set of the evaluation may have other splits than that of the training."""
    for named in ("", "train"):
        with pytest.raises(evaluators.LeakError, match=r"evals.mine: cases of pre-training .*: c4, c7\."):
            build({"mine": part(root, kind, pretrained=named)}, trained=("c0", "c4", "c7", "elsewhere"))
    assert build({"mine": part(root, kind, pretrained="")}, trained=("c0", "elsewhere"))


def test_due_at_its_steps_and_at_the_end(root):
    (evaluator,) = build({"probe": part(root, "probe")}).values()
    assert [s for s in range(36) if evaluator.due(s, 35)] == [0, 10, 20, 30, 35]
    (never,) = build({"probe": part(root, "probe", every=0)}).values()
    assert [s for s in range(36) if never.due(s, 35)] == [35]


def test_an_error_has_the_name_and_the_step(root):
    (evaluator,) = build({"mine": part(root, "probe", feature="hee")}).values()
    with pytest.raises(
        evaluators.EvaluatorError, match=r"'mine' failed at step 7: .*no features 'hee'; it has \['he'\]"
    ):
        evaluator(method([]), state(7))


@pytest.mark.parametrize(
    ("kind", "changed", "named"),
    [
        ("probe", {"kind": "prob"}, "did you mean 'probe'"),
        ("probe", {"pretrained": "test"}, "evals.mine: cases of pre-training.*c6, c7, c8"),
        ("knn", {"pretrained": "trian"}, "evals.mine: pretrained is 'trian'"),
        ("probe", {"target": "lable"}, "evals.mine: .*no column 'lable'"),
        ("probe", {"target": "dark"}, "not whole numbers"),
        ("decode", {"decoded": ("ihc",)}, r"evals.mine: partners to decode: \['ihc'\]"),
        ("decode", {"pretrained": "test"}, "evals.mine: cases of pre-training"),
        ("retrieval", {"target": "dark", "threshold": None, "regression": True}, "retrieval needs classes"),
        ("knn", {"target": "dark", "threshold": None, "regression": True}, "knn needs classes"),
        ("paper_head", {"target": "dark", "threshold": None, "regression": True}, "paper_head needs classes"),
        ("few_label", {"target": "dark", "threshold": None, "regression": True}, "few_label needs classes"),
        ("distance_ratio", {"near_um": 50.0}, "evals.mine: 0 < near_um <= far_um, not near_um=50"),
        ("probe", {"colour": "red"}, "keys of the config without effect: mine.colour"),
    ],
)
def test_a_bad_config_is_refused_before_anything_runs(root, kind, changed, named):
    with pytest.raises(ValueError, match=named):
        build({"mine": part(root, kind, **changed)})


def test_tiles_of_another_size_are_refused(root):
    with pytest.raises(ValueError, match="tiles of 8 px; the encoder is trained on tiles of 224 px"):
        build({"mine": part(root, "probe")}, size=224)


def test_a_partner_reaches_embed_only_where_it_is_asked_for(root):
    made = build({"mine": part(root, "probe", partners=("if",))})
    calls: list = []
    made["mine"](method(calls), state(0))
    assert calls == [["he", "if", "if_mask", "mask"]]
