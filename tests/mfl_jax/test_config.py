"""Configs: every one loads, in all sizes and words, and what is misspelt is named before anything is read."""

import importlib
import json
import time
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from mfl_jax import config as configs
from mfl_jax import methods, train
from mfl_jax.views import Modality
from tests.mfl_jax import synthetic

PAPER_EPOCHS = {"moco": 200}  # 100 for the others
NAMES = sorted(p.stem for p in synthetic.CONFIGS.glob("[!_]*.py") if p.stem != "common")


def load(name: str, arg: str = "") -> ConfigDict:
    return configs.load(f"{synthetic.CONFIGS / name}.py:{arg}")


def test_every_method_has_a_config():
    assert set(methods.METHODS) <= {load(name).method for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_config_says_what_it_is(name):
    text = importlib.import_module(f"configs.{name}").__doc__
    assert text is not None
    for part in (f"mfl train --config=configs/{name}.py", "''", "phantom", "gpu", "tiny", "Words", "Expect", "arXiv"):
        assert part in text, part


@pytest.mark.parametrize("size", ["", "phantom", "gpu", "tiny"])
@pytest.mark.parametrize("name", NAMES)
def test_every_config_builds_in_every_size_without_compiling(name, size):
    config = load(name, size)
    assert config.is_locked
    facts = synthetic.facts(config.data, examples=10_000)
    with synthetic.compilations() as compiled:
        run = train.plan(config, source=synthetic.Source(facts), facts=facts)
    assert not compiled
    paper = round(PAPER_EPOCHS.get(name, 100) * 10_000 / config.data.batch)
    assert run.total == {"tiny": 2, "phantom": 500, "gpu": 3000}.get(size, paper)


@pytest.mark.parametrize("name", NAMES)
def test_every_run_of_a_sweep_builds(name):
    found = list(importlib.import_module(f"configs.{name}").sweep())
    assert len(found) == len(set(found)) >= 2
    for arg in found:
        config = load(name, f"tiny,{arg}")
        facts = synthetic.facts(config.data)
        train.plan(config, source=synthetic.Source(facts), facts=facts)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_words_and_two_of_a_kind_are_refused(name):
    with pytest.raises(ValueError, match=r"phantom, gpu, tiny.*not phanton"):
        load(name, "phanton")
    with pytest.raises(ValueError, match="one of"):
        load(name, "phantom,tiny")
    of_a_kind = {"supervised": "if,ihc,both", "siamese": "margin,triplet", "moco": "near,tiny,phantom"}
    of_a_kind |= {"slpd": "lung,breast", "dino_tiles": "vit,resnet", "dino_regions": "gpu,phantom"}
    with pytest.raises(ValueError, match="one of"):
        load(name, of_a_kind.get(name, "vicreg,info_nce"))


@pytest.mark.parametrize("name", ["mfl", "trident", "supervised"])
def test_a_partner_of_any_name_is_treated_as_one_of_its_kind(name, monkeypatch):
    """In every size; a one-channel label map that somebody called nuclei is no map of the phantom."""
    monkeypatch.setitem(synthetic.PARTNERS, "her2", synthetic.PARTNERS["ihc"])
    one = (Modality("map", 1), (synthetic.SIZE, synthetic.SIZE, 1), "uint16")
    monkeypatch.setitem(synthetic.PARTNERS, "nuclei", one)
    more = ",both" if name == "supervised" else ""
    for size in ("", "phantom,", "tiny,"):
        own, like = load(name, f"{size}her2:ihc{more}"), load(name, f"{size}ihc{more}")
        assert own.data.partners == ("her2",)
        assert (own.views.eval_her2 == like.views.eval_ihc) or size == "tiny,"
        for config in (own, load(name, f"{size}nuclei:map{more}")):
            facts = synthetic.facts(config.data)
            train.plan(config, source=synthetic.Source(facts), facts=facts)
    with pytest.raises(ValueError, match="NAME:KIND for a partner of another name; not her2:ihx"):
        load(name, "her2:ihx")
    if name == "mfl":
        assert load(name, "cd3:if,her2:ihc,counts").mfl.partners == ("counts", "cd3", "her2")
    else:
        with pytest.raises(ValueError, match="one of"):
            load(name, f"cd3:if,her2:ihc{more}")


def test_overrides_keep_the_type_and_reach_any_depth():
    config = load(
        "mfl", "tiny,optim.lr=1,views.he='crop(.6,1)|flip',mfl.learn_temperature=true,total.steps=7,mesh.data=1"
    )
    assert (config.optim.lr, type(config.optim.lr)) == (1.0, float)
    assert config.views.he == "crop(.6,1)|flip"
    assert (config.mfl.learn_temperature, config.total.steps) == (True, 7)
    assert load("mfl", "data.partners=['if']").data.partners == ("if",)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("optim.lrr=1", "no key 'optim.lrr'; did you mean 'optim.lr'"),
        ("mlf.objective=x", "no key 'mlf.objective'; did you mean 'mfl.objective'"),
        ("optim=1", "optim"),
        ("data.batch=big", "data.batch is 128, of type int; 'big' is not"),
        ("data.batch=1.5", "of type int"),
        ("mfl.learn_temperature=1", "of type bool"),
    ],
)
def test_an_override_of_what_is_not_there_names_the_nearest(spec, message):
    with pytest.raises(ValueError, match=message):
        load("mfl", spec)


def test_a_config_that_is_not_there_names_the_nearest(tmp_path):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"there is no config .*mlf.py.*did you mean .*mfl.py"):
        configs.load(f"{synthetic.CONFIGS / 'mlf.py'}")
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    with pytest.raises(ValueError, match="no function get_config"):
        configs.load(str(empty))
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("words", "change", "message"),
    [
        ("", {"method": "mlf"}, "no method is called 'mlf'.*did you mean 'mfl'"),
        ("", {"encoder": "resnet51"}, "resnet51.*did you mean 'resnet50'"),
        ("", {"encoder": "resnet50,widht=2"}, "widht.*did you mean 'width'"),
        ("", {"dtype": "float16"}, "float32, bfloat16"),
        ("", {"views__he": "flipp"}, "flipp.*did you mean 'flip'"),
        ("", {"mfl__partners": ("ihc",)}, "data.partners reads"),
        ("", {"mfl__objective": "infonce"}, "allowed: info_nce, vicreg, barlow"),
        ("", {"total": ConfigDict({"epochs": 0})}, "must be above 0"),
        ("", {"total": ConfigDict({"weeks": 1})}, "exactly one of steps, epochs, examples"),
        ("", {"optim__warmup": "10 epocs"}, "duration"),
        ("", {"views__size": 0}, "size"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(words, change, message):
    config = synthetic.tiny("mfl", words, **change)
    start = time.perf_counter()
    facts = synthetic.facts(synthetic.tiny("mfl").data)
    with synthetic.compilations() as compiled, pytest.raises(ValueError, match=f"(?s){message}"):
        train.plan(config, source=synthetic.Source(facts), facts=facts)
    assert not compiled
    assert time.perf_counter() - start < 2


def test_a_key_that_nothing_reads_is_found_and_one_that_is_read_and_not_there():
    config = ConfigDict({"a": 1, "b": {"c": 2, "d": 3}})
    reading = configs.Reading(config)
    assert (reading.a, reading.b.c) == (1, 2)
    with pytest.raises(ValueError, match=r"without effect: b\.d"):
        reading.check_all_read()
    reading.check_all_read(but="b.")
    assert dict(reading.b.items()) == {"c": 2, "d": 3}
    reading.check_all_read()
    with pytest.raises(ValueError, match=r"lacks the key 'b.cc'; did you mean 'b.c'"):
        reading.b.cc  # noqa: B018


def test_a_config_survives_json():
    config = load("mfl", "tiny")
    assert configs.flatten(json.loads(configs.to_json(config))) == {
        key: list(value) if isinstance(value, tuple) else value for key, value in configs.flatten(config).items()
    }


def test_a_config_elsewhere_may_use_the_shared_parts(tmp_path):
    path = Path(tmp_path / "mine.py")
    path.write_text("from configs import mfl\ndef get_config(arg):\n    return mfl.get_config(arg)\n")
    assert configs.load(f"{path}:tiny").method == "mfl"


def test_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.load("configs/mfl.py:tiny").name == "mfl"
    (tmp_path / "configs").mkdir()
    own = "from ml_collections import ConfigDict\ndef get_config(arg):\n    return ConfigDict({'name': 'own'})\n"
    (tmp_path / "configs" / "mfl.py").write_text(own)
    assert configs.load("configs/mfl.py").name == "own"
