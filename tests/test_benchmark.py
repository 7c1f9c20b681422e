"""Laws of the timing, none of which asserts a time."""

import dataclasses
import json
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cofi_jax import benchmark


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


def test_calls_are_warmed_up_one_by_one_then_timed_in_turn():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    timings = benchmark.side_by_side(calls, repeats=4, warmup=2)
    assert "".join(order) == "aabb" + "abababab"
    assert [timing.repeats for timing in timings.values()] == [4, 4]


def test_times_go_to_the_call_they_belong_to(monkeypatch):
    clock = iter([0, 0.010, 1, 1.001, 2, 2.030, 3, 3.002])  # seconds
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    calls = {"a": lambda: None, "b": lambda: None}
    timings = benchmark.side_by_side(calls, repeats=2)
    np.testing.assert_allclose(timings["a"].times_ms, (10, 30))
    np.testing.assert_allclose(timings["b"].times_ms, (1, 2))


def test_a_call_is_timed_until_its_result_is_ready(monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    benchmark.side_by_side({"a": lambda: "result"}, repeats=2, warmup=1)
    assert waited == ["result"] * 3


def test_summary_agrees_with_numpy():
    times = tuple(np.random.default_rng(0).lognormal(size=37))
    timing = benchmark.Timing(times)
    assert timing.median_ms == np.median(times)
    assert timing.low_ms == np.percentile(times, 5)
    assert timing.high_ms == np.percentile(times, 95)
    assert timing.low_ms < timing.median_ms < timing.high_ms


def test_speedup_is_taken_pair_by_pair():
    # The machine is ten times slower in the second pair, for both.
    dense, pruned = benchmark.Timing((8, 80, 8)), benchmark.Timing((2, 20, 2))
    ratio, (low, high) = benchmark.speedup(dense, pruned)
    assert ratio == low == high == 4
    ratio, spread = benchmark.speedup(benchmark.Timing((8, 6, 4)), pruned)
    assert ratio == 3
    np.testing.assert_allclose(spread, np.percentile((4, 0.3, 2), (5, 95)))


def test_inference_returns_its_part_of_the_report():
    models = {"dense": stub(width=8), "pruned": stub(width=2)}
    result = benchmark.inference(models, batch_size=3, seq_length=5, repeats=4)
    assert json.loads(json.dumps(result)) == result
    assert set(result) == {"latency_ms", "speedup", "speedup_spread", "benchmark"}
    latency, how = result["latency_ms"], result["benchmark"]
    assert list(latency) == ["dense", "pruned"]
    assert result["speedup"] == latency["dense"] / latency["pruned"]
    for name, median in latency.items():
        low, high = how["latency_spread_ms"][name]
        assert 0 < low <= median <= high
        assert how["examples_per_second"][name] == pytest.approx(3000 / median)
    assert how["device"] == benchmark.describe(jax.devices()[0])
    sizes = [how[k] for k in ("dtype", "batch_size", "seq_length", "repeats")]
    assert sizes == ["float32", 3, 5, 4]


@pytest.fixture
def calls(monkeypatch):
    """The calls that `inference` would time, filled when it runs."""
    seen = {}

    def side_by_side(calls, *, repeats):
        seen.update(calls)
        return {name: benchmark.Timing((1.0,) * repeats) for name in calls}

    monkeypatch.setattr(benchmark, "side_by_side", side_by_side)
    return seen


def test_inference_gives_every_model_the_same_legal_batch(calls):
    models = {"a": stub(vocab_size=50), "b": stub(vocab_size=4), "c": stub()}
    result = benchmark.inference(models, batch_size=20, seq_length=9, repeats=1)
    assert "speedup" not in result  # of which two?
    batch = calls["a"].args[1]
    assert all(call.args[1] is batch for call in calls.values())
    assert all(v.shape == (20, 9) and v.dtype == jnp.int32 for v in batch.values())
    assert set(np.unique(batch["input_ids"])) == {0, 1, 2, 3}
    assert batch["attention_mask"].all() and not batch["token_type_ids"].any()


def test_params_are_an_argument_on_the_device(calls):
    model, params = stub()
    models = {"a": (model, jax.tree.map(np.asarray, params))}
    benchmark.inference(models, batch_size=1, seq_length=1, repeats=1)
    on_device, batch = calls["a"].args
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(on_device))
    expected = model.apply({"params": params}, batch).logits
    np.testing.assert_allclose(calls["a"](), expected, rtol=1e-6)


def test_dtypes_are_named_even_where_they_differ():
    models = {"a": stub(dtype="float32"), "b": stub(dtype="bfloat16")}
    result = benchmark.inference(models, batch_size=1, seq_length=1, repeats=1)
    assert result["benchmark"]["dtype"] == "float32 and bfloat16"


def test_cpu_is_described_by_name_and_cores():
    text = benchmark.describe(jax.devices("cpu")[0])
    assert text.startswith("cpu: ") and text.endswith(" cores")
    assert len(text) > len("cpu: , 2 cores")
