"""Laws of the timing, none of which asserts a time."""

import dataclasses
import gc
import json
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cofi_jax import benchmark
from cofi_jax.config import UserError


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
    timings = benchmark.side_by_side(calls, repeats=4, warmup=2, turn_ms=0)
    assert "".join(order) == "aabb" + "abababab"
    assert [timing.repeats for timing in timings.values()] == [4, 4]


def test_times_go_to_the_call_they_belong_to(monkeypatch):
    clock = iter([0, 0.010, 1, 1.001, 2, 2.030, 3, 3.002])  # seconds
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    calls = {"a": lambda: None, "b": lambda: None}
    timings = benchmark.side_by_side(calls, repeats=2, turn_ms=0)
    np.testing.assert_allclose(timings["a"].turns, [(10,), (30,)])
    np.testing.assert_allclose(timings["b"].turns, [(1,), (2,)])


def test_a_turn_has_as_many_calls_as_it_holds(monkeypatch):
    """Those that are slow have one each; of several the first does not count."""
    now = 0.0
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now)
    order = []

    def call(name, *milliseconds):
        durations = iter(milliseconds)

        def run():
            nonlocal now
            order.append(name)
            now += next(durations) / 1e3

        return run

    calls = {"slow": call("s", 80, 60, 70), "fast": call("f", 5, 30, 15, 10, 25, 40)}
    calls["slow"](), calls["fast"]()  # warm
    order.clear()
    timings = benchmark.side_by_side(calls, repeats=2, warmup=0, turn_ms=50)
    assert "".join(order) == "sfff" + "sff"
    np.testing.assert_allclose(timings["slow"].turns, [(60,), (70,)])
    np.testing.assert_allclose(timings["fast"].turns[0], (15, 10))
    np.testing.assert_allclose(timings["fast"].turns[1], (40,))
    np.testing.assert_allclose(timings["fast"].by_turn, (12.5, 40))


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_not_collected_meanwhile(enabled):
    before, seen = gc.isenabled(), []

    def call():
        seen.append(gc.isenabled())
        if len(seen) == 2:
            raise KeyboardInterrupt

    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(KeyboardInterrupt):
            benchmark.side_by_side({"a": call}, repeats=2, warmup=0, turn_ms=0)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert seen == [False, False]


def test_a_call_is_timed_until_its_result_is_ready(monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    benchmark.side_by_side({"a": lambda: "result"}, repeats=2, warmup=1, turn_ms=0)
    assert waited == ["result"] * 3


def test_every_turn_weighs_the_same():
    # Calls of 1 ms in four turns of a hundred, of 10 ms in six of five: most calls
    # took 1 ms, but most of the time a call took 10.
    turns = benchmark.Timing(((1.0,) * 100,) * 4 + ((10.0,) * 5,) * 6)
    assert turns.repeats == 10
    assert turns.median_ms == 10
    assert turns.percentile_ms(39) == 1 and turns.percentile_ms(41) == 10
    np.testing.assert_array_equal(turns.by_turn, [1] * 4 + [10] * 6)


def test_turns_of_one_call_are_plain_percentiles():
    times = np.random.default_rng(0).lognormal(size=37)
    found = benchmark.Timing(tuple((time,) for time in times))
    assert found.median_ms == np.median(times)
    assert found.percentile_ms(95) == np.sort(times)[-2]  # 35.15 of 37 are not above


def timing(*turns):
    return benchmark.Timing(tuple(np.atleast_1d(times) for times in turns))


def test_speedup_is_taken_turn_by_turn():
    # The machine is ten times slower in the second turn, for both.
    dense, pruned = timing(8, 80, 8), timing((2, 2.5, 1), (20, 20), 2)
    ratio, (low, high) = benchmark.speedup(dense, pruned)
    assert ratio == low == high == 4
    ratio, spread = benchmark.speedup(timing(8, 6, 4), pruned)
    assert ratio == 2  # of 4, 0.3 and 2
    np.testing.assert_allclose(spread, np.percentile((4, 0.3, 2), (5, 95)))


def test_speedup_stands_drift_that_the_ratio_of_medians_does_not():
    """Slow for most of one model's turns, less than half of the other's: 4 still."""
    rng = np.random.default_rng(0)
    slow = np.where(np.arange(41) < 20, 1.0, 7.0)  # from the midst of it
    pace = slow * np.exp(0.02 * rng.standard_normal((2, 41)))
    pace[0, 19] = 7.0  # a turn earlier for the one
    pace[1, 20] = 1.0  # a turn later for the other
    dense, pruned = timing(*(8 * pace[0])), timing(*(2 * pace[1]))
    assert benchmark.speedup(dense, pruned)[0] == pytest.approx(4, rel=0.02)
    assert dense.median_ms / pruned.median_ms > 20


def test_inference_returns_its_part_of_the_report():
    models = {"dense": stub(width=8), "pruned": stub(width=2)}
    result = benchmark.inference(models, batch_size=3, seq_length=5, repeats=4)
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
    assert how["device"] == benchmark.describe(jax.devices()[0])
    sizes = [how[k] for k in ("dtype", "batch_size", "seq_length", "repeats")]
    assert sizes == ["float32", 3, 5, 4]


@pytest.fixture
def calls(monkeypatch):
    """The calls that `inference` would time, filled when it runs."""
    seen = {}

    def side_by_side(calls, *, repeats):
        seen.update(calls)
        return {name: benchmark.Timing(((1.0,),) * repeats) for name in calls}

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


@pytest.mark.parametrize(
    "error",
    [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")],
)
def test_too_little_memory_is_said_in_one_line(error, monkeypatch):
    def side_by_side(calls, *, repeats):
        raise error

    monkeypatch.setattr(benchmark, "side_by_side", side_by_side)
    with pytest.raises(UserError, match="batch_size=2: .*memory.* of 3$"):
        benchmark.passes({"a": stub()}, batch_size=2, seq_length=3, repeats=1)


def test_other_failures_are_not_blamed_on_memory(monkeypatch):
    def side_by_side(calls, *, repeats):
        raise jax.errors.JaxRuntimeError("INTERNAL: bug")

    monkeypatch.setattr(benchmark, "side_by_side", side_by_side)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        benchmark.passes({"a": stub()}, batch_size=2, seq_length=3, repeats=1)


def test_cpu_is_described_by_name_and_cores():
    text = benchmark.describe(jax.devices("cpu")[0])
    assert text.startswith("cpu: ") and text.endswith(" cores")
    assert len(text) > len("cpu: , 2 cores")
