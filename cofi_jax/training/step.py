"""The training step, which all stages share; they differ in their objective alone.

    gradients = grad(objective)(trainable)            one backward pass
    descent: weights and log-alphas move against their gradients
    ascent:  the Lagrange multipliers move along theirs
    the log-alphas are clamped

Learning rates, the target and the seed are arrays in the state or the context, not
constants of the compiled program.
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

from cofi_jax.models.bert import Batch
from cofi_jax.pruning import hard_concrete
from cofi_jax.training.objectives import Metrics, Objective

_MAX_GRADIENT_NORM = 1.0


_ADAM_EPS = 1e-8


# These schedules run over the fraction of a ramp that is done, so that its length can
# be an array: another length needs no other program.
_RISE = optax.linear_schedule(0.0, 1.0, transition_steps=1)
_FALL = optax.linear_schedule(1.0, 0.0, transition_steps=1)


class Rate(flax.struct.PyTreeNode):
    """A learning rate that rises linearly, then stays or falls linearly to 0.

    Attributes:
      peak: the highest rate, reached at the end of the rise.
      warmup_steps: the steps of the rise, 0 for none.
      decay: the fraction of the peak that is lost with each later step.
    """

    peak: jax.Array
    warmup_steps: jax.Array
    decay: jax.Array

    @classmethod
    def create(
        cls, peak: float, schedule: str, total_steps: int, warmup_steps: int = 0
    ) -> "Rate":
        """Makes a `constant` rate, or a `linear` one that is 0 after `total_steps`."""
        falling = schedule == "linear"
        decay = 1 / max(total_steps - warmup_steps, 1) if falling else 0.0
        return cls(*(np.float32(x) for x in (peak, warmup_steps, decay)))

    def at(self, step: jax.Array) -> jax.Array:
        """Returns the rate of a step, counted from 0; the first one is not 0."""
        rise = _RISE((step + 1) / jnp.maximum(self.warmup_steps, 1))
        return self.peak * rise * _FALL((step - self.warmup_steps) * self.decay)


class TrainState(flax.struct.PyTreeNode):
    """All that a step reads and changes, and the best evaluation so far.

    Attributes:
      step: int32 number of the steps that are done.
      key: the root of the stage's randomness; step n uses fold_in(key, n).
      trainable: `params` (the trained part) and, where the objective has them,
        `distill_projection`, `log_alpha` and `multipliers`.
      frozen: the parameters that are not trained: the embeddings, or none.
      rates: the `Rate` of `weights` and, where they exist, `gates` and `multipliers`.
      descent: the optax state over the weights and the log-alphas.
      ascent: the optax state over the multipliers.
      best: the trainable of the best evaluation so far.
      best_score: the score of that evaluation, -inf before the first that counts.
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
    """Returns Adam for the log-alphas, and for weights clipped to a global norm of 1."""

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
    """Returns Adam on the multipliers, uphill."""
    return optax.chain(
        optax.scale(-1.0), optax.adam(rates["multipliers"], eps=_ADAM_EPS)
    )


def _players(trainable: dict) -> tuple[dict, dict]:
    """Splits what is trained into what descends and what ascends."""
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
    """Returns a state at step 0.

    Args:
      params: the parameters of the whole model; they are copied.
      seed: the run's seed.
      stage: the name, which makes the randomness of the stage its own.
      rates: the rate of `weights`, and of `gates` and `multipliers` if there are any.
      freeze_embeddings: whether the embeddings stay, their LayerNorm included.
      **trainable: `distill_projection`, `log_alpha`, `multipliers`.
    """
    frozen = {"embeddings": params["embeddings"]} if freeze_embeddings else {}
    trainable["params"] = {k: v for k, v in params.items() if k not in frozen}
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))
    return _fresh(key, trainable, frozen, rates)


@jax.jit  # This is one program instead of one for each shape.
def _fresh(key, trainable, frozen, rates):
    # A weakly typed scalar would have the second step traced again.
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
    """Stacks the parts of a batch; each part knows the denominators of the whole."""

    def split(x):  # Rows 0, m, 2m, ... come first, so that no row leaves its device.
        return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

    weight = batch["weight"]
    total = {"rows": weight, "tokens": batch["attention_mask"] * weight[:, None]}
    total = {n: jnp.broadcast_to(x.sum() / parts, parts) for n, x in total.items()}
    return jax.tree.map(split, batch) | {"total": total, "part": jnp.arange(parts)}


def _gradients(objective, micro_batches, trainable, frozen, context, batch, key):
    """Returns ((loss, metrics), gradients) of a batch that is taken in equal parts.

    `optax.microbatching` splits alike, but its parts know neither their number, which
    their dropout needs, nor the denominators of the whole batch.
    """

    def differentiate(part):
        function = jax.value_and_grad(objective, has_aux=True)
        return function(trainable, frozen, context, part, key)

    if micro_batches == 1:
        return differentiate(batch)
    parts = _split(batch, micro_batches)
    like = jax.eval_shape(differentiate, jax.tree.map(lambda x: x[0], parts))

    def add(total, part):
        found = differentiate(part)
        return jax.tree.map(lambda a, b: a + b / micro_batches, total, found), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return jax.lax.scan(add, zeros, parts)[0]


def train_step(
    state: TrainState,
    context: dict,
    batch: Batch,
    *,
    objective: Objective,
    micro_batches: int,
) -> tuple[TrainState, Metrics]:
    """Makes one step of the min-max game; see `make_step`."""
    key = jax.random.fold_in(state.key, state.step)
    context = dict(context, step=state.step)
    (loss, metrics), gradients = _gradients(
        objective, micro_batches, state.trainable, state.frozen, context, batch, key
    )
    rates = {name: rate.at(state.step) for name, rate in state.rates.items()}
    rates = dict.fromkeys(("gates", "multipliers"), 0.0) | rates
    down, up = _players(state.trainable)
    down_gradients, up_gradients = _players(gradients)
    updates, descent_state = descent(rates).update(down_gradients, state.descent, down)
    trainable = optax.apply_updates(down, updates)
    if "log_alpha" in trainable:
        clamped = jax.tree.map(hard_concrete.clamp, trainable["log_alpha"])
        trainable["log_alpha"] = clamped
    ascent_state = state.ascent
    if up:
        updates, ascent_state = ascent(rates).update(up_gradients, state.ascent, up)
        trainable["multipliers"] = optax.apply_updates(up, updates)
    state = state.replace(
        step=state.step + 1,
        trainable=trainable,
        descent=descent_state,
        ascent=ascent_state,
    )
    # A finite loss may have an infinite gradient, which would spoil the state.
    norm = optax.tree.norm(down_gradients)
    return state, {"loss": loss, **metrics, "gradient_norm": norm}


def make_step(objective: Objective, micro_batches: int = 1) -> Callable:
    """Returns the jitted `step(state, context, batch) -> (state, metrics)`.

    The step donates `state`: its arrays are gone afterwards.

    Args:
      objective: the function that is differentiated.
      micro_batches: the number of parts, one after the other, in which a batch that
        does not fit the memory is taken; B is a multiple of it. Losses and gradients
        are those of the whole batch except for rounding, dropout and the layers that
        are matched, which each part chooses by its own rows.
    """
    step = functools.partial(
        train_step, objective=objective, micro_batches=micro_batches
    )
    return jax.jit(step, donate_argnums=0)
