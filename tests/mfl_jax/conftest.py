"""What tests of training share: the toy method, and a cache for programs that several tests compile."""

import jax
import pytest

from mfl_jax import methods
from tests.mfl_jax import toy


@pytest.fixture
def toy_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.METHODS, "toy", toy.make)


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory: pytest.TempPathFactory):
    """A program that was compiled once in this session is not compiled again."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(tmp_path_factory.mktemp("programs")))
    jax.config.update(names[1], 0.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
