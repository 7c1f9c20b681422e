"""One state, one step, one loop; the stages differ in their objective alone.

    gradients = grad(objective)(trainable)            one backward pass
    descent:  weights and gates move against their gradients
    ascent:   the multipliers move along theirs
    gates are clamped

Learning rates, the target and the seed are arrays in the state, not constants of
the compiled program.
"""

import zlib
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cofi_jax.models.bert import Batch
from cofi_jax.pruning import masks
from cofi_jax.training.objectives import Objective

_MAX_GRADIENT_NORM = 1.0


_ADAM_EPS = 1e-8


class Rate(flax.struct.PyTreeNode):
    """A learning rate: a linear ramp times a constant or a line that falls to 0."""

    peak: jax.Array
    warmup_steps: jax.Array
    decay: jax.Array  # per step, 0 for a constant rate

    @classmethod
    def create(cls, peak: float, schedule: str, total_steps: int, warmup_steps=0):
        """`schedule` is constant, or linear: 0 after `total_steps`."""
        decay = 1 / total_steps if schedule == "linear" else 0.0
        return cls(*(np.float32(x) for x in (peak, warmup_steps, decay)))

    def at(self, step: jax.Array) -> jax.Array:
        """The rate of the 0-based `step`."""
        ramp = jnp.minimum(1.0, (step + 1) / jnp.maximum(self.warmup_steps, 1))
        return self.peak * ramp * jnp.maximum(0.0, 1 - self.decay * step)


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step reads and changes, and the best so far.

    Attributes:
      step: int32, steps done.
      key: the root of the stage's randomness; step n uses fold_in(key, n).
      trainable: `params` (trained part), and where the objective has them
        `distill_projection`, `log_alpha` and `multipliers`.
      frozen: the parameters that are not trained (the embeddings, or nothing).
      rates: a `Rate` for `weights`, `gates` and `multipliers`.
      descent: optax state over weights and gates.
      ascent: optax state over the multipliers.
      best: trainable of the best evaluation so far.
      best_score: its score, -inf before the first that counts.
    """

    step: jax.Array
    key: jax.Array
    trainable: dict
    frozen: dict
    rates: dict[str, Rate]
    descent: Any
    ascent: Any
    best: dict
    best_score: jax.Array


def descent(rates: dict[str, jax.Array]) -> optax.GradientTransformation:
    """Adam on weights (clipped to a global norm of 1) and on gates, at their rates."""

    def adam(rate):
        return optax.adam(rate, eps=_ADAM_EPS)

    weights = optax.chain(
        optax.clip_by_global_norm(_MAX_GRADIENT_NORM), adam(rates["weights"])
    )
    return optax.partition(
        {"weights": weights, "gates": adam(rates["gates"])},
        lambda trainable: {
            k: "gates" if k == "log_alpha" else "weights" for k in trainable
        },
    )


def ascent(rates: dict[str, jax.Array]) -> optax.GradientTransformation:
    """Adam on the multipliers, uphill."""
    return optax.chain(
        optax.scale(-1.0), optax.adam(rates["multipliers"], eps=_ADAM_EPS)
    )


def _players(trainable: dict) -> tuple[dict, dict]:
    """What descends, what ascends."""
    down = {k: v for k, v in trainable.items() if k != "multipliers"}
    return down, trainable.get("multipliers", {})


def create_state(
    params: dict,
    *,
    seed: int,
    stage: str,
    rates: dict[str, Rate],
    freeze_embeddings: bool,
    **trainable: Any,
) -> TrainState:
    """A state at step 0.

    Args:
      params: the whole model's parameters; they are copied.
      seed: of the run.
      stage: its name makes the stage's randomness its own.
      rates: `weights`, and `gates` and `multipliers` where trainable has them.
      freeze_embeddings: whether the embeddings, their LayerNorm included, stay.
      **trainable: `distill_projection`, `log_alpha`, `multipliers`.
    """
    frozen = {"embeddings": params["embeddings"]} if freeze_embeddings else {}
    trainable["params"] = {k: v for k, v in params.items() if k not in frozen}
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))
    return _fresh(key, trainable, frozen, rates)


@jax.jit  # one program instead of one for each shape
def _fresh(key, trainable, frozen, rates):
    # With its dtype: a weakly typed scalar would have the second step retraced.
    trainable = jax.tree.map(lambda x: jnp.array(x, jnp.float32), trainable)
    down, up = _players(trainable)
    zero_rates = dict.fromkeys(("weights", "gates", "multipliers"), 0.0)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.clone(key),
        trainable=trainable,
        frozen=jax.tree.map(jnp.copy, frozen),
        rates=jax.tree.map(jnp.array, rates),
        descent=descent(zero_rates).init(down),
        ascent=ascent(zero_rates).init(up),
        best=jax.tree.map(jnp.copy, trainable),
        best_score=jnp.array(-jnp.inf, jnp.float32),
    )


def _split(batch: Batch, parts: int) -> Batch:
    """The batch as so many smaller ones, stacked; each knows the whole's totals."""

    def split(x):  # rows 0, m, 2m, ... first: no row leaves its device
        return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

    weight = batch["weight"]
    total = {"rows": weight, "tokens": batch["attention_mask"] * weight[:, None]}
    total = {n: jnp.broadcast_to(x.sum() / parts, parts) for n, x in total.items()}
    return jax.tree.map(split, batch) | {"total": total, "part": jnp.arange(parts)}


def make_step(objective: Objective, micro_batches: int = 1) -> Callable:
    """The jitted `step(state, context, batch) -> (state, metrics)`; donates `state`.

    Args:
      objective: what is differentiated.
      micro_batches: parts that a batch is worked through in, one after the other, for
        what does not fit the memory at once; B is a multiple of it. Losses and
        gradients are those of the whole batch, but for the rounding, the dropout, and
        the layers that are matched, which each part chooses by its own rows.
    """

    def differentiate(trainable, *rest):
        return jax.value_and_grad(objective, has_aux=True)(trainable, *rest)

    def in_parts(trainable, frozen, context, batch, key):
        def add(total, part):
            found = differentiate(trainable, frozen, context, part, key)
            return jax.tree.map(lambda a, b: a + b / micro_batches, total, found), None

        parts = _split(batch, micro_batches)
        first = jax.tree.map(lambda x: x[0], parts)
        like = jax.eval_shape(differentiate, trainable, frozen, context, first, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        return jax.lax.scan(add, zeros, parts)[0]

    gradients_of = differentiate if micro_batches == 1 else in_parts

    def step(state: TrainState, context: dict, batch: Batch):
        key = jax.random.fold_in(state.key, state.step)
        context = dict(context, step=state.step)
        (loss, metrics), gradients = gradients_of(
            state.trainable, state.frozen, context, batch, key
        )
        rates = {name: rate.at(state.step) for name, rate in state.rates.items()}
        rates = dict.fromkeys(("gates", "multipliers"), 0.0) | rates
        down, up = _players(state.trainable)
        down_gradients, up_gradients = _players(gradients)
        updates, descent_state = descent(rates).update(
            down_gradients, state.descent, down
        )
        trainable = optax.apply_updates(down, updates)
        if "log_alpha" in trainable:
            trainable["log_alpha"] = masks.clamp(trainable["log_alpha"])
        if up:
            updates, ascent_state = ascent(rates).update(up_gradients, state.ascent, up)
            trainable["multipliers"] = optax.apply_updates(up, updates)
        else:
            ascent_state = state.ascent
        state = state.replace(
            step=state.step + 1,
            trainable=trainable,
            descent=descent_state,
            ascent=ascent_state,
        )
        # A finite loss may have an infinite gradient, which would spoil the state.
        norm = optax.tree.norm(down_gradients)
        return state, {"loss": loss, **metrics, "gradient_norm": norm}

    return jax.jit(step, donate_argnums=0)
