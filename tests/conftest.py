"""Tiny models that several test files share."""

import gc
import json
import os
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest

from cofi_jax.errors import UserError
from cofi_jax.models.bert import abstract_params
from cofi_jax.models.config import EncoderConfig
from cofi_jax.report import figures

# The same programs are compiled again and again, in this process and in others.
_compiled = tempfile.TemporaryDirectory()


os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _compiled.name)


os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


# XLA's older code generators for CPUs give the same programs in half the time.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)


jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])


jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


# Tracing makes so many objects that a tenth of the time would go to looking for cycles.
gc.set_threshold(50_000)


TINY = EncoderConfig(
    vocab_size=17,
    hidden_size=16,
    heads=(3, 3),
    head_size=4,
    intermediate=(6, 6),
    pooler_size=7,
    num_labels=3,
    max_positions=9,
    dropout=0.1,
)


def pytest_collection_finish():
    """Lets collections of garbage pass over what was imported, which stays anyway."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skips what needs more than the test dependencies, where it is not there."""
    if item.get_closest_marker("torch"):
        pytest.importorskip("torch")
    if item.get_closest_marker("encoder") and "COFI_JAX_ENCODER" not in os.environ:
        pytest.skip("COFI_JAX_ENCODER does not name the folder of a pretrained encoder")


@pytest.fixture(scope="session")
def tiny():
    """A model small enough to slice many times."""
    return TINY


@pytest.fixture(scope="session")
def tiny_params(tiny):
    """Parameters of `tiny`: every kind of them random, activations of order 1."""
    return random_params(tiny, seed=0)


@pytest.fixture(scope="session")
def tiny_batch(tiny):
    """Three rows of 6, 4 and 1 real tokens, padded to 6."""
    rng = np.random.default_rng(1)
    lengths = np.array([6, 4, 1])
    return {
        "input_ids": rng.integers(0, tiny.vocab_size, (3, 6)).astype(np.int32),
        "attention_mask": (np.arange(6) < lengths[:, None]).astype(np.int32),
        "token_type_ids": rng.integers(0, 2, (3, 6)).astype(np.int32),
    }


@pytest.fixture(scope="session")
def code_cache(tmp_path_factory):
    """Where transformers copies a folder's code to: not the home folder.

    One for all of a process: what was imported from it once stays in sys.modules.
    """
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("hub") / "modules")
        name = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
        patch.setattr(name, cache)
        patch.syspath_prepend(cache)
        yield cache


@pytest.fixture(scope="module")
def quick_compile():
    """XLA without its optimisations, for files that mostly wait for the compiler."""
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # for processes started
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]


@pytest.fixture(scope="module")
def without_pictures():
    """Reports whose pictures are empty, for files that look at other things."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_picture", lambda figure, **how: b"")
        yield


WITHOUT_US = ("cofi_jax", "flax", "jax", "jaxlib")


def printed_without(packages, program, code_cache):
    """What `program` prints as JSON, in a process that cannot import the packages.

    It copies a folder's code to the `code_cache`, too: in the home folder, several such
    processes would write over each other's.
    """
    # None in sys.modules is a package that is not there.
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in packages)]
    command = [sys.executable, "-c", "\n".join([*lines, program])]
    env = os.environ | {"HF_HOME": os.path.dirname(code_cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def complaint(call, *arguments):
    """The one line that a call is refused with."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message.isprintable()
    return message


def random_params(config, seed):
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, values = path[-1].key, rng.standard_normal(leaf.shape)
        if name == "kernel":
            values /= np.sqrt(config.hidden_size)
        elif name == "scale":
            values = 1 + 0.3 * values
        elif name == "bias":
            values *= 0.3
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))
