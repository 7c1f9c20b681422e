"""Structures that reach a speedup, by a table of times and then by the clock.

A table is wrong by a few per cent, because blocks compete for caches and because the
ends of a model are not like its middle. So the structure that should reach the speedup
by the table is measured, and the next one is chosen for a speedup that is corrected by

    measured / predicted

This ratio differs little between similar structures, so a few passes are enough.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import INNER, blocks
from cofi_jax.pruning import constraint, hard_concrete, latency, transforms
from cofi_jax.pruning.cost import Cost
from cofi_jax.pruning.masks import LogAlpha, Masks, mask_shapes, real_positions
from cofi_jax.pruning.transforms import MaskTransform

PASSES = 4
TOLERANCE = 0.02  # A measured speedup is at least the one asked for, up to this more.
_DAMPING = 0.7  # of the correction from the third pass on, which is mostly noise
_CLOSE = 1e-3  # The time that is left differs from its target by this fraction of it.
_FINE = ("intermediate", "head")  # the kinds whose masks make up for the rest


class Found(NamedTuple):
    """Masks, the pass that measured them, and all passes in their order."""

    masks: Masks
    chosen: "Pass"
    passes: list["Pass"]


class Pass(NamedTuple):
    """One structure on the way.

    Attributes:
      aim: the speedup that it was chosen for, by the table.
      predicted: the speedup that it has by the table.
      measured: the speedup that was measured.
      error: the standard error of that, as a fraction of it.
    """

    aim: float
    predicted: float
    measured: float
    error: float

    def miss(self, asked: float) -> float:
        """Returns how far the speedup is from the middle of its interval."""
        return abs(self.measured / asked - 1 - TOLERANCE / 2)

    @property
    def allowed(self) -> float:
        """The largest miss that ends the search.

        Two standard errors within the interval; or one beyond it, where the noise does
        not allow more.
        """
        half = TOLERANCE / 2
        return half - 2 * self.error if self.error < half / 2 else half + self.error


def largest(config: EncoderConfig, kinds: Sequence[str], table: latency.Table) -> float:
    """Returns the largest speedup that masks of these kinds can reach, by the table.

    Where they can close all blocks, the fastest one stays.
    """
    time = latency.cost(table)
    closed = {k: np.zeros(shape) for k, shape in mask_shapes(config, kinds).items()}
    least, whole = time.exact(closed, config), time.exact({}, config)
    if least <= table.overhead:
        there = [block for block in blocks(config) if any(block.sizes(config))]
        times = (_least_time(block, config, kinds, table) for block in there)
        least = least + min(times, default=0)
    return float(whole / least)


def _least_time(block, config, kinds, table):
    """The time of the fastest block of its name that is not absent."""
    units, curve = min(filter(None, block.sizes(config))), table.curves[block.name]
    return np.interp(1 if block.inner in kinds else units, *curve)


def masks_at(
    log_alpha: LogAlpha,
    config: EncoderConfig,
    target: float,
    cost: Cost,
    settle: MaskTransform,
    multiple: int = 1,
) -> Masks:
    """Returns masks that leave as much of the time as the target allows, and no more.

    They are those of `constraint.final_masks`, whose steps are whole blocks at times.
    So what is left of the time is filled with units of the blocks that are there. If
    that is not enough, the most open of the closed heads open too, and then the most
    open blocks, and units close until the target is met again.

    Args:
      log_alpha: the log-alphas of the pruned kinds.
      config: the sizes of the model that is pruned.
      target: the fraction of the cost to remove.
      cost: the cost, `latency.cost`.
      settle: what becomes of soft masks.
      multiple: what the device likes feed-forward widths to be a multiple of.
    """
    transform = settle
    if multiple > 1:
        rounded = transforms.round_to_multiple(config, intermediate=multiple)
        transform = transforms.chain(settle, rounded)
    close = _CLOSE * (1 - target)
    masks = constraint.final_masks(log_alpha, config, target, transform, cost, close)
    masks = {k: np.asarray(v) for k, v in transforms.drop_empty()(masks).items()}
    fine = next((kind for kind in _FINE if kind in masks), None)
    if fine is None:
        return masks
    log_alpha = {kind: np.asarray(value) for kind, value in log_alpha.items()}
    soft = settle({k: hard_concrete.deterministic(v) for k, v in log_alpha.items()})
    soft = {kind: np.asarray(mask) for kind, mask in soft.items()}
    multiple = multiple if fine == "intermediate" else 1

    whole = cost.exact({}, config)

    def excess(masks):
        return 1 - cost.exact(masks, config) / whole - target

    def filled(masks):
        """With as many fine masks as fit, those first that are open; None if none does.

        A row that is at a step of its curve is passed over.
        """
        place = _opening_order(masks, log_alpha, fine, config, multiple)
        value = np.where(masks[fine] > 0, masks[fine], soft[fine])
        full = place.size

        def opened(number, most):
            return masks | {fine: np.where(place < np.minimum(number, most), value, 0)}

        most = np.full((len(place), 1), full)  # of the groups that a row opens
        number = 0
        if excess(opened(number, most)) < 0:
            return None
        while excess(opened(full, most)) < 0:
            too_many = full
            while too_many - number > 1:
                middle = (number + too_many) // 2
                fits = excess(opened(middle, most)) >= 0
                number, too_many = (middle, too_many) if fits else (number, middle)
            most[(place == number).any(-1)] = number
            number = too_many
        return opened(full, most)

    best, larger, found = masks, masks, filled(masks)
    while found is not None:
        if excess(best) < 0 or excess(found) < excess(best):
            best = found
        if excess(best) <= close:
            break
        found = None
        for each in _larger(larger, log_alpha, soft, fine, config):
            if (found := filled(each)) is not None:
                larger = each
                break
    return best


def _open_rows(masks, kind):
    """Returns which rows of a kind are those of a block that is there, (L,)."""
    there = (masks[kind] > 0).any(-1)
    for outer, inner in INNER.items():
        if inner == kind and outer in masks:
            there = there & (masks[outer] > 0)
    return there


def _opening_order(masks, log_alpha, fine, config, multiple):
    """Returns how many groups of fine masks open before each, (L, W).

    A group is `multiple` masks of a row. Groups with open masks come first, and the
    first one of each row has -1. Padding and absent blocks have the number of all.
    """
    there = _open_rows(masks, fine)[:, None] & real_positions(config).get(fine, True)
    there = np.broadcast_to(there, masks[fine].shape)
    closed = masks[fine] <= 0
    keys = np.where(there, -log_alpha[fine], np.inf), closed | ~there
    order = np.lexsort(keys, -1)
    rank = np.argsort(order, -1)
    first = rank // multiple * multiple  # the rank of the first mask of the group
    value, closed = (np.take_along_axis(key, order, -1) for key in keys)
    value, closed = (np.take_along_axis(key, first, -1) for key in (value, closed))
    row = np.broadcast_to(np.arange(len(rank))[:, None], rank.shape)
    free = there & (first > 0)
    keys = np.stack([key[free] for key in (first, row, value, closed)])
    order = np.lexsort(keys)
    begins = (np.diff(keys[:, order], prepend=np.nan) != 0).any(0)
    place = np.where(there, -1, rank.size)
    place[tuple(index[order] for index in np.nonzero(free))] = np.cumsum(begins) - 1
    return place


def _larger(masks, log_alpha, soft, fine, config):
    """Yields larger masks: with a head more, or, if there is none, with a block more.

    The block is the most open one, and then the most open one of the other kind, which
    may fit where the first one does not.
    """
    real = real_positions(config)

    def most_open(kind, able):
        able = able & real.get(kind, True)
        value = np.where(able, log_alpha[kind], -np.inf)
        place = np.unravel_index(value.argmax(), value.shape)
        return place if able[place] else None

    def opened(masks, kind, place):
        mask = masks[kind].copy()
        mask[place] = soft[kind][place]
        return masks | {kind: mask}

    kinds = [kind for kind in _FINE if kind in masks and kind != fine]
    places = {
        kind: most_open(kind, (masks[kind] <= 0) & _open_rows(masks, kind)[:, None])
        for kind in kinds
    }
    if not any(places.values()):
        places = {k: most_open(k, masks[k] <= 0) for k in INNER if k in masks}
    places = {kind: place for kind, place in places.items() if place is not None}
    for kind in sorted(places, key=lambda kind: -log_alpha[kind][places[kind]]):
        larger = opened(masks, kind, places[kind])
        if (inner := INNER.get(kind)) in masks:  # A block comes with one of its units.
            row = np.zeros(masks[inner].shape, bool)
            row[places[kind]] = True
            larger = opened(larger, inner, most_open(inner, row))
        yield larger


def reach(
    asked: float,
    choose: Callable[[float], tuple[Masks, float]],
    measure: Callable[[Masks], tuple[float, float]],
) -> Found:
    """Finds masks whose sliced model is measured to be as fast as was asked for.

    A pass ends the search if its speedup is in [asked, 1.02 asked], two standard errors
    of the measurement from both ends. Where the noise is too large for that, being
    outside by no more than a standard error ends it. At most four passes are made.

    Args:
      asked: the speedup.
      choose: maps a speedup to masks that have it by a table, and to the speedup that
        they have by the table; it may differ a little.
      measure: maps masks to the measured speedup of the sliced model, and its standard
        error as a fraction of it.

    Returns:
      The masks that miss the middle of the interval by the least.
    """
    factor, found = 1.0, []
    middle = asked * (1 + TOLERANCE / 2)
    while len(found) < PASSES:
        aim = middle / factor
        masks, predicted = choose(aim)
        last = Pass(aim, predicted, *measure(masks))
        found.append((masks, last))
        if last.miss(asked) <= last.allowed:
            break
        change = last.measured / last.predicted / factor
        factor *= change ** (1 if len(found) < 3 else _DAMPING)
    best = min(found, key=lambda each: each[1].miss(asked))
    return Found(*best, [each for _, each in found])
