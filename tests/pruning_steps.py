"""Fifty steps of the pruning stage on all devices there are.

python tests/pruning_steps.py FOLDER FOLDER_OF_OTHERS

It leaves what was learned in FOLDER/end.npz. What it makes of the checkpoint that
another number of devices left at step 25 goes to FOLDER/resumed.npz.
"""

import dataclasses
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
from conftest import TINY, random_params

from cofi_jax.checkpoints import state as state_lib
from cofi_jax.config import Config
from cofi_jax.data import batches, tasks
from cofi_jax.models.bert import Encoder
from cofi_jax.pruning import masks
from cofi_jax.run import stages
from cofi_jax.training import log, teacher
from cofi_jax.training import step as step_lib

STEPS, HALF = 50, 25


BUCKETS = (5, 9)


def learn(folder, cache="none"):
    """Runs the stage, or what `folder` lacks: trainable and what was guarded."""
    config = Config(log_every=HALF, eval_every=HALF, checkpoint_every=HALF)
    config.data = dataclasses.replace(
        config.data, task="demo", max_length=BUCKETS[-1], buckets=BUCKETS
    )
    config.prune = dataclasses.replace(
        config.prune,
        epochs=5,
        prepruning_epochs=0,
        warmup_epochs=2,
        batch_size=8,
        targets=(0.5,),
        learning_rate=1e-3,
        mask_learning_rate=0.1,
        multiplier_learning_rate=0.1,
    )
    config.eval_batch_size = 8
    config.distill.cache = cache
    folder.mkdir(exist_ok=True)
    run = stages.Run(
        config,
        folder,
        tasks.find(config.data),
        dataclasses.replace(TINY, num_labels=2),
        examples(80),
        {"validation": examples(20)},
        log.MetricsLog(folder / "metrics.jsonl"),
    )
    model = Encoder(dataclasses.replace(TINY, num_labels=2))
    start = jax.device_put(random_params(model.config, seed=3))
    student = stages.Student(start, jnp.eye(TINY.hidden_size))

    traced, make_step = [], step_lib.make_step

    def make_guarded(objective, *rest):
        def counted(trainable, frozen, context, batch, key):
            traced.append(batch["input_ids"].shape)
            return objective(trainable, frozen, context, batch, key)

        step = make_step(counted, *rest)

        def guarded(*args):
            with jax.transfer_guard("disallow"):
                return jax.block_until_ready(step(*args))

        return guarded

    step_lib.make_step = make_guarded
    (stair,) = stages.stairs((0.5,))
    try:
        teaching = teacher.TeacherCache(model, start, config.distill)
        student, gates, _ = stages.learn_masks(run, stair, model, student, teaching)
    finally:
        step_lib.make_step = make_step
    assert sorted(traced) == [(8, length) for length in BUCKETS]  # once for each
    trainable = last_theta(folder, run, model, start)
    found = trainable | {"gates": gates, "student": student.params}
    for seeds in ("importance", "compensated"):
        config.prune.seeds = seeds
        # A folder keeps what was measured in it; this one has nothing yet.
        shutil.rmtree(folder / seeds, ignore_errors=True)
        (folder / seeds).mkdir()
        apart = dataclasses.replace(run, workdir=folder / seeds)
        found[seeds], _ = stages._first_log_alpha(apart, stair, model, start)
    paths = jax.tree_util.tree_leaves_with_path(found)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in paths}


def last_theta(folder, run, model, start):
    """As the last checkpoint has it, of however many devices, read on one."""
    rate = step_lib.learning_rate(0.0, "constant", STEPS)
    like = step_lib.create_state(
        start,
        seed=0,
        stage="prune",
        rates=dict.fromkeys(("weights", "masks", "multipliers"), rate),
        freeze_embeddings=run.config.prune.freeze_embeddings,
        distill_projection=jnp.eye(TINY.hidden_size),
        log_alpha=masks.init_log_alpha(model.config, jax.random.key(0)),
        multipliers={"linear": 0.0, "quadratic": 0.0},
    )
    with state_lib.Checkpoints(folder / "checkpoints" / "prune") as saved:
        state = saved.restore(like)
    assert int(state.step) == STEPS
    return state.trainable


def examples(rows):
    rng = np.random.default_rng(rows)
    lengths = rng.integers(3, BUCKETS[-1] + 1, rows)
    ids = [rng.integers(0, TINY.vocab_size, n).astype(np.int32) for n in lengths]
    types = [np.zeros_like(row) for row in ids]
    return batches.Examples(ids, types, rng.integers(0, 2, rows).astype(np.int32))


def resume(others, folder):
    """Goes on from the checkpoint that `others` has of the middle."""
    shutil.copytree(others, folder)
    shutil.rmtree(folder / "checkpoints" / "prune" / str(STEPS))
    return learn(folder, cache="host")


def main(folder, others):
    folder.mkdir()
    np.savez(folder / "end.npz", **learn(folder / "run", cache="device"))
    np.savez(folder / "resumed.npz", **resume(others, folder / "resumed"))


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
