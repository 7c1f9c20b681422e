"""What a run's report says of speed; none of it asserts a time."""

import dataclasses
import json
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cofi_jax.errors import UserError
from cofi_jax.evaluation import latency as latency_lib
from cofi_jax.evaluation import timing


class Output(NamedTuple):
    logits: jax.Array
    hidden_states: jax.Array


@dataclasses.dataclass(frozen=True)
class StubConfig:
    vocab_size: int = 11
    width: int = 8
    dtype: str = "float32"


class Stub(nn.Module):
    config: StubConfig

    @nn.compact
    def __call__(self, batch):
        x = nn.Embed(self.config.vocab_size, self.config.width)(batch["input_ids"])
        x = x * batch["attention_mask"][..., None]
        return Output(nn.Dense(2, dtype=self.config.dtype)(x[:, 0]), x)


def stub(**sizes):
    model = Stub(StubConfig(**sizes))
    batch = {"input_ids": jnp.zeros((1, 2), int), "attention_mask": jnp.ones((1, 2))}
    return model, model.init(jax.random.key(0), batch)["params"]


def test_inference_returns_its_part_of_the_report():
    models = {"dense": stub(width=8), "pruned": stub(width=2)}
    result = latency_lib.inference(models, batch_size=3, seq_length=5, repeats=4)
    assert json.loads(json.dumps(result)) == result
    assert set(result) == {"latency_ms", "speedup", "speedup_spread", "benchmark"}
    latency, how = result["latency_ms"], result["benchmark"]
    assert list(latency) == ["dense", "pruned"]
    low, high = result["speedup_spread"]
    assert 0 < low <= result["speedup"] <= high
    for name, median in latency.items():
        low, high = how["latency_spread_ms"][name]
        assert 0 < low <= median <= high
        assert how["examples_per_second"][name] == pytest.approx(3000 / median)
    assert how["device"] == timing.describe(jax.devices()[0])
    sizes = [how[k] for k in ("dtype", "batch_size", "seq_length", "repeats")]
    assert sizes == ["float32", 3, 5, 4]


@pytest.fixture
def calls(monkeypatch):
    """The calls that `inference` would time, filled when it runs."""
    seen = {}

    def side_by_side(calls, *, repeats, rest_ms):
        seen.update(calls)
        return {name: timing.Timing(((1.0,),) * repeats) for name in calls}

    monkeypatch.setattr(timing, "side_by_side", side_by_side)
    return seen


def test_inference_gives_every_model_the_same_legal_batch(calls):
    models = {"a": stub(vocab_size=50), "b": stub(vocab_size=4), "c": stub()}
    result = latency_lib.inference(models, batch_size=20, seq_length=9, repeats=1)
    assert "speedup" not in result  # of which two?
    batch = calls["a"].args[1]
    assert all(call.args[1] is batch for call in calls.values())
    assert all(v.shape == (20, 9) and v.dtype == jnp.int32 for v in batch.values())
    assert set(np.unique(batch["input_ids"])) == {2, 3}
    assert batch["attention_mask"].all() and not batch["token_type_ids"].any()


def test_params_are_an_argument_on_the_device(calls):
    model, params = stub()
    models = {"a": (model, jax.tree.map(np.asarray, params))}
    latency_lib.inference(models, batch_size=1, seq_length=1, repeats=1)
    on_device, batch = calls["a"].args
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(on_device))
    expected = model.apply({"params": params}, batch).logits
    np.testing.assert_allclose(calls["a"](), expected, rtol=1e-6)


def test_dtypes_are_named_even_where_they_differ():
    models = {"a": stub(dtype="float32"), "b": stub(dtype="bfloat16")}
    result = latency_lib.inference(models, batch_size=1, seq_length=1, repeats=1)
    assert result["benchmark"]["dtype"] == "float32 and bfloat16"


@pytest.mark.parametrize(
    "error",
    [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")],
)
def test_too_little_memory_is_said_in_one_line(error, monkeypatch):
    def side_by_side(calls, **how):
        raise error

    monkeypatch.setattr(timing, "side_by_side", side_by_side)
    models = {"a": stub()}
    with pytest.raises(UserError, match="batch_size=2: .*memory.* of 3$"):
        latency_lib.inference(models, batch_size=2, seq_length=3, repeats=1)


def test_other_failures_are_not_blamed_on_memory(monkeypatch):
    def side_by_side(calls, **how):
        raise jax.errors.JaxRuntimeError("INTERNAL: bug")

    monkeypatch.setattr(timing, "side_by_side", side_by_side)
    models = {"a": stub()}
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        latency_lib.inference(models, batch_size=2, seq_length=3, repeats=1)
