"""The state and the step that all stages share; only their objectives differ.

A step computes the gradient of the objective with respect to everything that is
trained, in one backward pass. Adam then moves the weights and the masks down the
gradient and the Lagrange multipliers up, and the log-alphas are clamped.

Learning rates, the target and the seed are arrays in the state or the context. As
constants of the compiled program, they would need a new compilation for each value.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from optax import microbatching

from cofi_jax.models.bert import Batch
from cofi_jax.pruning import masks
from cofi_jax.training.objectives import Objective

_MAX_GRADIENT_NORM = 1.0
_ADAM_EPS = 1e-8

# The hyperparameters of a learning rate schedule: peak, warmup_steps and decay.
Rate = dict[str, np.float32]
_CONSTANT_ZERO = {"peak": 0.0, "warmup_steps": 0.0, "decay": 0.0}


def learning_rate(
    peak: float, schedule: str, total_steps: int, warmup_steps: int = 0
) -> Rate:
    """Returns the hyperparameters of `rate_at` for a stage.

    Args:
      peak: the rate at the end of the warm-up.
      schedule: "constant", or "linear" for a rate that falls to 0 at `total_steps`.
      total_steps: the number of steps of the stage.
      warmup_steps: the number of steps in which the rate rises to the peak.
    """
    decay = 1 / max(total_steps - warmup_steps, 1) if schedule == "linear" else 0.0
    values = {"peak": peak, "warmup_steps": warmup_steps, "decay": decay}
    return {name: np.float32(value) for name, value in values.items()}


def rate_at(
    step: ArrayLike, peak: jax.Array, warmup_steps: jax.Array, decay: jax.Array
) -> jax.Array:
    """Returns the learning rate of a step; this is a schedule for optax.

    Step n, counted from 0, of a warm-up of w steps has (n + 1) / w of the peak, because
    a first step with a rate of 0 would be wasted. Afterwards the rate falls by `decay`
    times the peak in each step. The schedules of optax itself do not fit, because their
    lengths are constants of the compiled program.
    """
    step = jnp.asarray(step)
    rise = (step + 1) / jnp.maximum(warmup_steps, 1)
    return peak * jnp.minimum(rise, jnp.maximum(0.0, 1 - decay * (step - warmup_steps)))


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes, and the best result so far.

    Attributes:
      step: the number of steps done, int32.
      key: the random key of the stage; step n uses fold_in(key, n).
      trainable: the parameters that are trained, as `params`, and if the objective has
        them `distill_projection`, `log_alpha` and `multipliers`.
      frozen: the parameters that are not trained: the embeddings, or none.
      optimizer: the state of `optimizer`, including the learning rates.
      best: `trainable` at the best evaluation so far.
      best_score: the score of that evaluation, -inf before the first that counts.
    """

    step: jax.Array
    key: jax.Array
    trainable: dict
    frozen: dict
    optimizer: Any
    best: dict
    best_score: jax.Array


def optimizer(rates: dict[str, Rate] | None = None) -> optax.GradientTransformation:
    """Returns the optimizers of the weights, the masks and the multipliers.

    Each is Adam. The weights and the masks descend, and the multipliers ascend. The
    gradient of the weights is clipped to a global norm of 1.

    Args:
      rates: the learning rates of "weights", "masks" and "multipliers". Only `init`
        needs them, which writes them to the state; `update` reads them from there.
    """

    @functools.partial(optax.inject_hyperparams, hyperparam_dtype=jnp.float32)
    def adam(peak, warmup_steps, decay):
        rate = functools.partial(
            rate_at, peak=peak, warmup_steps=warmup_steps, decay=decay
        )
        return optax.adam(rate, eps=_ADAM_EPS)

    def adam_of(player):
        return adam(**(rates or {}).get(player, _CONSTANT_ZERO))

    clip = optax.clip_by_global_norm(_MAX_GRADIENT_NORM)
    players = {"log_alpha": "masks", "multipliers": "multipliers"}
    return optax.partition(
        {
            "weights": optax.chain(clip, adam_of("weights")),
            "masks": adam_of("masks"),
            "multipliers": optax.chain(optax.scale(-1.0), adam_of("multipliers")),
        },
        lambda trainable: {name: players.get(name, "weights") for name in trainable},
    )


def create_state(
    params: dict,
    *,
    seed: int,
    stage: str,
    rates: dict[str, Rate],
    freeze_embeddings: bool,
    **trainable: Any,
) -> TrainState:
    """Returns the state of a stage at step 0.

    Args:
      params: the parameters of the whole model, which are copied.
      seed: the seed of the run.
      stage: the name of the stage, from which its random key is derived.
      rates: the `learning_rate` of "weights", and if they are trained also that of
        "masks" and "multipliers".
      freeze_embeddings: whether the embeddings and their LayerNorm are not trained.
      **trainable: `distill_projection` (D', D), `log_alpha` and `multipliers`, if the
        objective has them.
    """
    frozen = {"embeddings": params["embeddings"]} if freeze_embeddings else {}
    trainable["params"] = {k: v for k, v in params.items() if k not in frozen}
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))
    return _create(key, trainable, frozen, rates)


@jax.jit  # This makes one program instead of one for each shape.
def _create(key, trainable, frozen, rates):
    # With weakly typed scalars, the second step would be compiled again.
    trainable = jax.tree.map(lambda x: jnp.array(x, jnp.float32), trainable)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.clone(key),
        trainable=trainable,
        frozen=jax.tree.map(jnp.copy, frozen),
        optimizer=optimizer(rates).init(trainable),
        best=jax.tree.map(jnp.copy, trainable),
        best_score=jnp.array(-jnp.inf, jnp.float32),
    )


def quick_to_compile() -> dict[str, int]:
    """Returns options for `jax.jit` that make a CPU ready for its first step sooner.

    At the first level of LLVM's optimisations, compilation takes 40 % less time. The
    step is as fast, as its time goes into matrix products, which a library computes.
    """
    already = jax.config.read("jax_disable_most_optimizations")
    if already or jax.default_backend() != "cpu":
        return {}
    return {"xla_backend_optimization_level": 1}


def make_step(objective: Objective, micro_batches: int = 1) -> Callable:
    """Returns the jitted `step(state, context, batch) -> (state, metrics)`.

    The metrics are the loss, the metrics of the objective, and the norm of the gradient
    without that of the multipliers. The memory of the old state is donated to the new.

    Args:
      objective: the objective that is differentiated.
      micro_batches: the number of parts that a batch is worked through in, one after
        the other, if the whole does not fit into memory; it divides B. The loss and the
        gradient are those of the whole batch, except for rounding, for dropout, and for
        the matching of layers and the margins between rows, in which each part
        considers its own rows only.
    """

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=quick_to_compile())
    def step(state: TrainState, context: dict, batch: Batch):
        key = jax.random.fold_in(state.key, state.step)
        differentiate = functools.partial(
            jax.value_and_grad(objective, has_aux=True),
            state.trainable,
            state.frozen,
            dict(context, step=state.step),
        )
        if micro_batches == 1:
            (loss, metrics), gradients = differentiate(batch, key)
        else:
            (loss, metrics), gradients = _in_parts(
                differentiate, micro_batches, batch, key
            )
        updates, optimizer_state = optimizer().update(
            gradients, state.optimizer, state.trainable
        )
        trainable: Any = optax.apply_updates(state.trainable, updates)
        if "multipliers" in trainable:
            # Clamping keeps the gradient of P(mask > 0) alive. The exact constraint,
            # which has no multipliers, does not use that gradient.
            trainable["log_alpha"] = masks.clamp(trainable["log_alpha"])
        state = state.replace(
            step=state.step + 1, trainable=trainable, optimizer=optimizer_state
        )
        # A finite loss may have an infinite gradient, which would spoil the state.
        descending = {k: v for k, v in gradients.items() if k != "multipliers"}
        norm = optax.tree.norm(descending)
        return state, {"loss": loss, **metrics, "gradient_norm": norm}

    return step


def _in_parts(differentiate, parts, batch, key):
    """Returns the means of `differentiate` over parts of the batch, one by one."""
    weight = batch["weight"]
    # The denominators of the losses are those of the whole batch.
    whole = {name: batch[name] for name in ("labels", "weight", "attention_mask")}

    def of_part(rows, part):
        beside = {"whole": whole, "parts": parts, "part": part[0]}
        return differentiate(rows | beside, key)

    # Part m has the rows m, m + parts, and so on, so that no row leaves its device.
    return microbatching.microbatch(
        of_part,
        argnums=(0, 1),
        microbatch_size=len(weight) // parts,
        accumulator=microbatching.AccumulationType.MEAN,
    )(batch, jnp.arange(len(weight)) % parts)
