"""What the device could do: its measured rates, and how little work there is.

    floor of a pass = max(2 * multiply-adds / matrix rate, bytes / bandwidth)

Both rates are of a program that does nothing else, the best of its calls and their
median, taken in the same run. Work is that of matrix products alone, counted from the
sizes.

Shapes: B batch, T tokens, D hidden, L layers, F intermediate, K taught layers.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from cofi_jax.config import Distill
from cofi_jax.evaluation import timing
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import cost
from cofi_jax.training import losses

_SIDE = {"cpu": 2048}  # of the square matrices; elsewhere 8192


_NUMBERS = {"cpu": 2**25}  # float32 ones in each array that is streamed; else 2**28


_CALLS = 10


def rates(dtype: str) -> dict[str, float]:
    """Measures `flops_per_second` in `dtype` and `bytes_per_second`.

    The matrix product is of two squares of 2048 (on a GPU 8192), what is streamed is
    x = x + 2 y over arrays of 128 MiB (1 GiB): two read, one written.
    """
    platform = jax.default_backend()
    side, numbers = _SIDE.get(platform, 8192), _NUMBERS.get(platform, 2**28)
    left, right = (jnp.full((side, side), x, dtype) for x in (0.5, 0.25))
    x, y = (jnp.full(numbers, value, jnp.float32) for value in (1, 2))
    add = jax.jit(lambda x, y: x + 2 * y, donate_argnums=0)  # no memory is asked for

    def stream():
        nonlocal x
        x = add(x, y)
        return x

    found = timing.side_by_side(
        {
            "product": functools.partial(jax.jit(jnp.matmul), left, right),
            "stream": stream,
        },
        repeats=_CALLS,
        turn_ms=0,
    )
    seconds = {
        "product": found["product"].by_turn.min() / 1e3,
        "stream": found["stream"].median_ms / 1e3,  # parts of it may be in a cache
    }
    return {
        "flops_per_second": 2 * side**3 / seconds["product"],
        "bytes_per_second": 3 * 4 * numbers / seconds["stream"],
        "matrix_side": side,
        "streamed_bytes": 3 * 4 * numbers,
    }


def pass_seconds(
    config: EncoderConfig, *, batch_size: int, seq_length: int, rates: dict[str, float]
) -> float:
    """The least time of a forward pass at those `rates`."""
    work = 2 * batch_size * cost.multiply_adds(config, seq_length)
    moved = pass_bytes(config, batch_size=batch_size, seq_length=seq_length)
    return max(work / rates["flops_per_second"], moved / rates["bytes_per_second"])


def pass_bytes(config: EncoderConfig, *, batch_size: int, seq_length: int) -> int:
    """What a forward pass must move, with every block in one piece.

    Each parameter once (of the embeddings only the rows of the tokens, their positions
    and one type), and the hidden states B T D once into and once out of each block that
    is there. Caches that hold all that from pass to pass are faster still; so is what
    computes of the last layer only what the head reads, as our ONNX graphs do.
    """
    itemsize = jnp.dtype(config.dtype).itemsize
    tokens, width = batch_size * seq_length, config.hidden_size
    blocks = sum(h > 0 for h in config.heads) + sum(f > 0 for f in config.intermediate)
    norms = 2 * width * (blocks + 1)
    head = (config.pooler_size + 1) * config.num_labels
    if config.reads_every_token:
        head = (width + 1) * config.num_labels
    else:
        head += (width + 1) * config.pooler_size
    params = cost.num_params({}, config) + norms + head
    embedded = (tokens + seq_length + 1) * width
    states = tokens * width * (1 + 2 * blocks)
    return itemsize * (params + embedded + states)


def step_flops(
    student: EncoderConfig,
    teacher: EncoderConfig,
    lengths: Iterable[int] | np.ndarray,
    distill: Distill,
    *,
    masked: bool = False,
    taught: bool = False,
) -> int:
    """Operations of a distillation step: two for each multiply-add of its products.

    With m(T) multiply-adds of a forward pass of T tokens, D' and D the widths of
    student and teacher, the sum over the rows of

        m_teacher(T)
        3 m_student(T)          forward; backward to the inputs and to the weights
        - T D' n                the embeddings are frozen: the first block's n inner
                                units (3 heads' widths each, or units) need no
                                gradient to their input, unless gates of the
                                hidden dimensions wait for it
        (N + 3 K) T D' D        projection of the N layers with a block, of the K
                                chosen ones, forward and backward

    Args:
      student: sizes of what is trained.
      teacher: sizes of what it imitates.
      lengths: tokens of each row, without padding: so it is the useful work.
      distill: the layers that are taught.
      masked: whether there are such gates.
      taught: whether the teacher has said it all before: without m_teacher.
    """
    first = 0
    for heads, units in zip(student.heads, student.intermediate, strict=True):
        first = 3 * heads * student.head_size or units
        if first:
            break
    if masked:
        first = 0
    widths = zip(student.heads, student.intermediate, strict=True)
    compared = sum(any(width) for width in widths)
    compared += 3 * len(losses.taught_layers(len(teacher.heads), distill.num_layers))
    total = 0
    for length, count in zip(*np.unique(lengths, return_counts=True), strict=True):
        length = int(length)
        one = 3 * cost.multiply_adds(student, length)
        one += 0 if taught else cost.multiply_adds(teacher, length)
        one -= length * student.hidden_size * first
        if distill.layers:
            one += compared * length * student.hidden_size * teacher.hidden_size
        total += int(count) * one
    return 2 * total
