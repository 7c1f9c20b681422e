"""What the teacher says: of the right layers, and the same bits when it was kept."""

import dataclasses
import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params

from cofi_jax.checkpoints.state import Checkpoints
from cofi_jax.config import Config, Distill
from cofi_jax.data import batches
from cofi_jax.errors import UserError
from cofi_jax.models.bert import Encoder
from cofi_jax.training import loop, objectives, step
from cofi_jax.training import teacher as teacher_lib
from cofi_jax.training.log import MetricsLog
from cofi_jax.training.step import learning_rate

pytestmark = pytest.mark.usefixtures("quick_compile")


BATCH, BUCKETS = 4, (4, 9)


@pytest.fixture(scope="module")
def examples():
    """22 rows, 6 steps an epoch: in each length some are left over for the next."""
    rng = np.random.default_rng(0)
    ids = [
        rng.integers(1, 17, n).astype(np.int32) for n in [1, 9, 4, 3, 5, 2, 8, 4] * 3
    ]
    ids = ids[:22]
    labels = rng.integers(0, 3, len(ids)).astype(np.int32)
    return batches.Examples(ids, [np.zeros_like(i) for i in ids], labels)


def stream_of(examples):
    sizes = {"batch_size": BATCH, "buckets": BUCKETS}
    return functools.partial(batches.stream, examples, **sizes, seed=57, stage="prune")


def model_of(tiny, problem="classification", dtype="float32"):
    return Encoder(dataclasses.replace(tiny, problem=problem, dtype=dtype))


@pytest.mark.parametrize(
    "distill, taught",
    [
        (Distill(num_layers=2), (0, 1)),
        (Distill(num_layers=1), (1,)),
        (Distill(num_layers=1, taught="random"), (0, 1)),
        (Distill(layers=0.0), None),
        (Distill(logits=0.0, num_layers=1), (1,)),
    ],
)
def test_teacher_outputs_are_what_the_model_says(
    tiny, tiny_params, tiny_batch, distill, taught
):
    model = model_of(tiny)
    teacher_outputs = teacher_lib.make_teacher_forward(model, distill)(
        tiny_params, tiny_batch
    )
    output = model.apply({"params": tiny_params}, tiny_batch)
    assert ("logits" in teacher_outputs) == (distill.logits > 0)
    assert ("states" in teacher_outputs) == (distill.layers > 0)
    if "logits" in teacher_outputs:
        np.testing.assert_allclose(teacher_outputs["logits"], output.logits, rtol=1e-5)
    if "states" in teacher_outputs:
        assert teacher_outputs["states"].shape == (3, 6, len(taught), 16)
        for k, layer in enumerate(taught):
            state = output.hidden_states[layer + 1]
            np.testing.assert_allclose(
                teacher_outputs["states"][:, :, k], state, atol=1e-5
            )


@pytest.mark.parametrize("cache", ["host", "device"])
@pytest.mark.parametrize(
    "problem, dtype", [("classification", "float32"), ("span", "bfloat16")]
)
def test_what_is_kept_has_the_same_bits(tiny, examples, cache, problem, dtype):
    """Three epochs; from the second on only rows that moved up are asked about."""
    model = model_of(tiny, problem, dtype)
    params, distill = random_params(model.config, 1), Distill(num_layers=2)
    asked = []

    def outputs_of(cache):
        teaching = teacher_lib.TeacherCache(
            model, params, dataclasses.replace(distill, cache=cache)
        )
        teach = teaching._teach

        def counted(params, batch):
            asked.append(cache)
            return teach(params, batch)

        teaching._teach = counted
        return teaching.of(examples, BUCKETS, BATCH)

    fresh, kept = outputs_of("none"), outputs_of(cache)
    stream = stream_of(examples)()
    for rows, batch in itertools.islice(stream, 18):
        batch = jax.device_put(batch)
        expected, found = fresh(rows, batch), kept(rows, batch)
        real = np.asarray(batch["attention_mask"]) > 0
        assert expected.keys() == found.keys()
        for name, values in jax.device_get(found).items():
            wanted = jax.device_get(expected[name])
            assert values.dtype == wanted.dtype and values.shape == wanted.shape
            if values.ndim > 2:
                values, wanted = values[real], wanted[real]
            np.testing.assert_array_equal(values, wanted)
    assert asked.count("none") == 18
    assert 6 <= asked.count(cache) <= 12


def test_training_on_what_is_kept_is_the_same(tiny, examples, tmp_path):
    """Every loss and parameter of three epochs, bit by bit; dropout, random layers."""
    model = model_of(tiny)
    teacher = random_params(tiny, 1)
    results = {}
    for cache in ("none", "host", "device"):
        distill = Distill(num_layers=1, taught="random", cache=cache)
        log = MetricsLog(tmp_path / f"{cache}.jsonl")
        state = step.create_state(
            random_params(tiny, 2),
            seed=0,
            stage="prune",
            rates={"weights": learning_rate(1e-3, "constant", 1)},
            freeze_embeddings=True,
            distill_projection=jnp.eye(16),
        )
        teaching = teacher_lib.TeacherCache(model, teacher, distill)
        with Checkpoints(tmp_path / cache) as saved:
            state, _ = loop.fit(
                state,
                loop.Loop(
                    stage="prune",
                    step=step.make_step(
                        objectives.DistillationObjective(model, distill)
                    ),
                    context={},
                    batches=stream_of(examples),
                    total_steps=18,
                    evaluate=lambda *_: loop.Evaluation(0.0),
                    checkpoints=saved,
                    log=log,
                    every=loop.Every(log=1, evaluation=100, checkpoint=100),
                    teacher_outputs=teaching.of(examples, BUCKETS, BATCH),
                ),
            )
        lines = (tmp_path / f"{cache}.jsonl").read_text().splitlines()
        losses = [line.partition('"loss":')[2] for line in lines]
        results[cache] = losses, jax.device_get(state.trainable)
    for cache in ("host", "device"):
        assert results[cache][0] == results["none"][0]
        jax.tree.map(
            np.testing.assert_array_equal, results[cache][1], results["none"][1]
        )


def test_stages_share_what_is_kept_only_in_the_same_shapes(tiny, tiny_params, examples):
    teaching = teacher_lib.TeacherCache(
        model_of(tiny), tiny_params, Distill(cache="host")
    )
    first = teaching.of(examples, BUCKETS, 4) and teaching._store
    assert teaching.of(examples, BUCKETS, 4) and teaching._store is first
    others = examples.take(np.random.default_rng(0).permutation(22))  # as many
    for rows, size in ((examples, 2), (others, 2), (examples.take(np.arange(8)), 2)):
        before = teaching._store
        assert teaching.of(rows, BUCKETS, size) and teaching._store is not before


@pytest.mark.parametrize("cache", ["host", "device"])
def test_the_memory_is_said_before(tiny, examples, capsys, monkeypatch, cache):
    tokens = sum(map(len, examples.input_ids)) + 1  # one for padding
    need = (tokens * 2 * 16 + 22 * 3) * 4  # two layers of width 16, three classes
    config = Config(distill=Distill(num_layers=2, cache=cache))
    for free, enough in ((need, True), (need - 1, False)):
        monkeypatch.setattr(teacher_lib, "_free_memory", lambda where, free=free: free)
        if enough:
            teacher_lib.check_teacher_cache(config, tiny, examples)
            assert f"22 rows of {tokens - 1} tokens" in capsys.readouterr().err
        else:
            with pytest.raises(UserError, match=f"distill.cache='{cache}'.* GB are"):
                teacher_lib.check_teacher_cache(config, tiny, examples)


def test_nothing_is_said_where_nothing_is_kept(tiny, examples, capsys):
    for distill in (Distill(), Distill(0.0, 0.0, cache="host")):
        teacher_lib.check_teacher_cache(Config(distill=distill), tiny, examples)
    assert not capsys.readouterr().err


def test_free_memory_is_a_number():
    assert teacher_lib._free_memory("host") > 0
    assert teacher_lib._free_memory("device") > 0


@pytest.mark.parametrize("version", [1, 2])
def test_page_cache_is_free_memory(version, monkeypatch):
    """A container's limit counts what it reads of files, but gives that up at need."""
    v2 = {
        "memory.max": "9000000",
        "memory.current": "8500000",
        "memory.stat": "anon 500000\nfile 8000000\nshmem 1000000\n"
        "inactive_anon 1\nactive_anon 1\ninactive_file 4000000\nactive_file 3000000\n",
    }
    v1 = {
        "memory/memory.limit_in_bytes": v2["memory.max"],
        "memory/memory.usage_in_bytes": v2["memory.current"],
        "memory/memory.stat": "inactive_file 7\nactive_file 8\n"
        "total_inactive_file 4000000\ntotal_active_file 3000000\n",
    }
    files, read = (v1, v2)[version - 1], pathlib.Path.read_text

    def fake(path, *arguments):
        group = pathlib.Path("/sys/fs/cgroup")
        if not path.is_relative_to(group):
            return read(path, *arguments)
        if str(path.relative_to(group)) not in files:
            raise FileNotFoundError(path)
        return files[str(path.relative_to(group))]

    monkeypatch.setattr(pathlib.Path, "read_text", fake)
    assert teacher_lib._free_memory("host") == 9e6 - (8.5e6 - 7e6)
    files |= dict.fromkeys(files, "max")  # no limit: what the machine has
    assert teacher_lib._free_memory("host") > 9e6
