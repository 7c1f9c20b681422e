"""Tables of times: made, shown, and checked against whole models.

The table is that of a dense model, see `evaluation.latency_table`. A run that asks for
a speedup takes it by `prune.latency_table`, or makes its own.
"""

import math
import pathlib
from typing import Any

import numpy as np

from cofi_jax import files
from cofi_jax.benchmarks import workload
from cofi_jax.errors import reject
from cofi_jax.evaluation import latency_table
from cofi_jax.export import runtimes


def measure(
    model: str,
    dtype: str,
    batch_size: int,
    seq_length: int,
    repeats: int,
    runtime: str,
    table: str,
    structures: int,
    **sizes: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Makes a table, or reads one, and perhaps checks it.

    Args:
      model: see `workload.load`; the dense one is meant.
      dtype: of the matrix products.
      batch_size: the sequences in a batch.
      seq_length: the tokens in a sequence.
      repeats: the turns of each model.
      runtime: one of `runtimes.NAMES`.
      table: the file; one that is there is read, and must be of the same key.
      structures: the number of random structures that are timed to check the table, or
        0 to show it.
      **sizes: of a random model.

    Returns:
      The conditions with what the table says of the dense model, and a row for each
      time of the table; or, where structures are timed, a row for each of them, and
      the `ratio` of measured over predicted times as `mean_ratio` and `deviation`.

    Raises:
      UserError: for a table of another key, and where it cannot be written or read.
    """
    opener = runtimes.timed(runtime, "runtime")
    config = workload.load(model, dtype=dtype, longest=seq_length, **sizes).dense
    key = latency_table.key_of(
        config, runtime=runtime, batch_size=batch_size, seq_length=seq_length
    )
    path = pathlib.Path(table)
    how = {"repeats": repeats, "rest_ms": runtimes.rest_ms(runtime)}
    if path.exists():
        content = latency_table.read(path, "table")
        latency_table.check_key(content, key, "table", path)
    else:
        try:
            files.check_writable(path)
        except OSError as error:
            legal = f"cannot be written ({error.strerror})"
            raise reject("table", table, legal) from error
        content = latency_table.measure(config, opener, key, **how)
        latency_table.write(path, content)
    names = ("overhead_ms", "dense_ms", "additivity", "seconds")
    found = {"key": key} | {name: content[name] for name in names}
    if not structures:
        return found, rows(content)
    each = latency_table.residuals(
        content, config, opener, structures=structures, **how
    )
    ratios = np.log([row["ratio"] for row in each])
    found["mean_ratio"] = math.exp(ratios.mean())
    found["deviation"] = float(ratios.std(ddof=1)) if structures > 1 else 0.0
    return found, each


def rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the times of a table, as measured and as a constraint takes them."""
    curves, found = latency_table.table(content).curves, []
    for name, block in content["blocks"].items():
        columns = (block["counts"], block["ms"], block["spread"], curves[name].ms)
        for units, ms, spread, smooth in zip(*columns, strict=True):
            times = {"ms": ms, "spread": spread, "smoothed_ms": float(smooth)}
            found.append({"block": name, "units": units} | times)
    return found
