"""Laws of the timing, none of which asserts a time."""

import gc
import time

import jax
import numpy as np
import pytest

from cofi_jax.evaluation import timing


def test_calls_are_warmed_up_one_by_one_then_timed_in_turn():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    timings = timing.side_by_side(calls, repeats=4, warmup=2, turn_ms=0)
    assert "".join(order) == "aabb" + "abababab"
    assert [len(each.turns) for each in timings.values()] == [4, 4]


def test_times_go_to_the_call_they_belong_to(monkeypatch):
    clock = iter([0, 0.010, 1, 1.001, 2, 2.030, 3, 3.002])  # seconds
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    calls = {"a": lambda: None, "b": lambda: None}
    timings = timing.side_by_side(calls, repeats=2, turn_ms=0)
    np.testing.assert_allclose(timings["a"].turns, [(10,), (30,)])
    np.testing.assert_allclose(timings["b"].turns, [(1,), (2,)])


def test_a_turn_has_as_many_calls_as_it_holds(monkeypatch):
    """Those that are slow have one each; of several the first does not count."""
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
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
    timings = timing.side_by_side(calls, repeats=2, warmup=0, turn_ms=50)
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
            timing.side_by_side({"a": call}, repeats=2, warmup=0, turn_ms=0)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert seen == [False, False]


def test_a_call_is_timed_until_its_result_is_ready(monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    timing.side_by_side({"a": lambda: "result"}, repeats=2, warmup=1, turn_ms=0)
    assert waited == ["result"] * 3


def test_every_turn_weighs_the_same():
    # Calls of 1 ms in four turns of a hundred, of 10 ms in six of five: most calls
    # took 1 ms, but most of the time a call took 10.
    found = timing.Timing(((1.0,) * 100,) * 4 + ((10.0,) * 5,) * 6)
    assert found.median_ms == 10
    assert found.percentile_ms(39) == 1 and found.percentile_ms(41) == 10
    np.testing.assert_array_equal(found.by_turn, [1] * 4 + [10] * 6)


def test_turns_of_one_call_are_plain_percentiles():
    times = np.random.default_rng(0).lognormal(size=37)
    found = timing.Timing(tuple((time,) for time in times))
    assert found.median_ms == np.median(times)
    assert found.percentile_ms(95) == np.sort(times)[-2]  # 35.15 of 37 are not above


def turns(*times):
    return timing.Timing(tuple(np.atleast_1d(turn) for turn in times))


def test_speedup_is_taken_turn_by_turn():
    # The machine is ten times slower in the second turn, for both.
    dense, pruned = turns(8, 80, 8), turns((2, 2.5, 1), (20, 20), 2)
    ratio, low, high = timing.speedup(dense, pruned)
    assert ratio == low == high == 4
    ratio, *spread = timing.speedup(turns(8, 6, 4), pruned)
    assert ratio == 2  # of 4, 0.3 and 2
    np.testing.assert_allclose(spread, np.percentile((4, 0.3, 2), (5, 95)))


def test_speedup_stands_drift_that_the_ratio_of_medians_does_not():
    """Slow for most of one model's turns, less than half of the other's: 4 still."""
    rng = np.random.default_rng(0)
    slow = np.where(np.arange(41) < 20, 1.0, 7.0)  # from the midst of it
    pace = slow * np.exp(0.02 * rng.standard_normal((2, 41)))
    pace[0, 19] = 7.0  # a turn earlier for the one
    pace[1, 20] = 1.0  # a turn later for the other
    dense, pruned = turns(*(8 * pace[0])), turns(*(2 * pace[1]))
    assert timing.speedup(dense, pruned)[0] == pytest.approx(4, rel=0.02)
    assert dense.median_ms / pruned.median_ms > 20


def test_cpu_is_described_by_name_and_cores():
    text = timing.describe(jax.devices("cpu")[0])
    assert text.startswith("cpu: ") and text.endswith(" cores")
    assert len(text) > len("cpu: , 2 cores")
