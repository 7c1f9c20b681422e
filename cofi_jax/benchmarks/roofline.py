"""The least time that a device needs for a pass, from its measured rates.

    roofline of a pass = max(2 * multiply-adds / matrix rate, bytes / bandwidth)

Both rates are those of a program that does nothing else: the best of its calls for the
matrix product, the median for the bandwidth. They are measured in the same run. The
multiply-adds are those of matrix products alone, counted from the sizes.

Shapes: B batch, T tokens, D hidden dimensions, N layers with a block, K taught layers.
"""

import collections
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from cofi_jax.config import Distill
from cofi_jax.evaluation import timing
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import cost
from cofi_jax.training import losses

_SIDE = {"cpu": 2048}  # of the square matrices; 8192 on other devices
_NUMBERS = {"cpu": 2**25}  # float32 numbers in a streamed array; 2**28 on other devices
_CALLS = 10


def rates(dtype: str) -> dict[str, float]:
    """Measures `flops_per_second` in `dtype` and `bytes_per_second`.

    The matrix product is of two squares. The stream is x = x + 2 y, which reads two
    arrays and writes one.
    """
    platform = jax.default_backend()
    side, numbers = _SIDE.get(platform, 8192), _NUMBERS.get(platform, 2**28)
    left, right = (jnp.full((side, side), x, dtype) for x in (0.5, 0.25))
    x, y = (jnp.full(numbers, value, jnp.float32) for value in (1, 2))
    add = jax.jit(lambda x, y: x + 2 * y, donate_argnums=0)  # x is overwritten.

    def stream():
        nonlocal x
        x = add(x, y)
        return x

    product = functools.partial(jax.jit(jnp.matmul), left, right)
    calls = {"product": product, "stream": stream}
    found = timing.side_by_side(calls, repeats=_CALLS, turn_ms=0)
    # A cache may speed up the best call of the stream.
    fastest, usual = found["product"].by_turn.min(), found["stream"].median_ms
    return {
        "flops_per_second": float(2e3 * side**3 / fastest),
        "bytes_per_second": 3 * numbers * x.itemsize / usual * 1e3,
        "matrix_side": side,
        "streamed_bytes": 3 * numbers * x.itemsize,
    }


def pass_seconds(
    config: EncoderConfig, *, batch_size: int, seq_length: int, rates: dict[str, float]
) -> float:
    """Returns the least time of a forward pass of (B, T) tokens at those `rates`."""
    work = 2 * batch_size * cost.multiply_adds(config, seq_length)
    moved = pass_bytes(config, batch_size=batch_size, seq_length=seq_length)
    return max(work / rates["flops_per_second"], moved / rates["bytes_per_second"])


def pass_bytes(config: EncoderConfig, *, batch_size: int, seq_length: int) -> int:
    """Returns the bytes that a forward pass must move.

    It reads each parameter once (of the embeddings only the rows of the tokens, their
    positions and one type), and the hidden states, B T D, move once into and once out
    of each block that is present. A pass can be faster where a cache holds all this
    from pass to pass, or where only those states of the last layer are computed that
    the head reads, as in our ONNX graphs.
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
    lengths: Iterable[int],
    *,
    masked: bool = False,
    taught: bool = False,
) -> int:
    """Returns the operations of a step with `Distill()`, two for each multiply-add.

    With m(T) multiply-adds of a forward pass of T tokens, D' and D the widths of
    student and teacher, they are the sum over the rows of

        m_teacher(T)
        3 m_student(T)          forward; backward to the inputs and to the weights
        - T D' n                the first block's n inner units (3 widths of its heads
                                together, or its units) need no gradient to their
                                input, as embeddings are frozen; but with masks of
                                the hidden dimensions they do
        (N + 3 K) T D' D        projection of the N layers with a block, and of the K
                                chosen ones forward and backward

    Args:
      student: the sizes of the model that is trained.
      teacher: the sizes of the model that it imitates.
      lengths: the tokens of each row without padding, which counts the useful work.
      masked: whether there are masks of the hidden dimensions.
      taught: whether the teacher's outputs were kept, so that m_teacher falls away.
    """
    blocks = zip(student.heads, student.intermediate, strict=True)
    inner = [3 * heads * student.head_size or units for heads, units in blocks]
    first = 0 if masked else next(filter(None, inner), 0)
    compared = sum(width > 0 for width in inner)
    layers = losses.taught_layers(len(teacher.heads), Distill().num_layers)
    compared += 3 * len(layers)
    total = 0
    for length, count in collections.Counter(map(int, lengths)).items():
        one = 3 * cost.multiply_adds(student, length)
        one += 0 if taught else cost.multiply_adds(teacher, length)
        one -= length * student.hidden_size * first
        one += compared * length * student.hidden_size * teacher.hidden_size
        total += count * one
    return 2 * total
