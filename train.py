"""Prunes a model: teacher, prune, slice, fine-tune, score, measure, save.

    python train.py --config configs/sst2_95.py
    python train.py --config configs/sst2_95.py --config.data.path=path/to/sst2

Killed at any moment, the same command goes on where it was. All devices of the machine
are used; those of several machines, with --distributed on each (docs/devices.md).
"""

import logging
import sys

from cofi_jax import distributed as distributed_lib
from cofi_jax.errors import UserError
from cofi_jax.report import tables
from cofi_jax.run.cli import parse
from cofi_jax.run.run import run


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    # Beneath a damaged file the storage library prints hundreds of lines there.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        config, workdir, distributed = parse(argv)
        if distributed:
            distributed_lib.start()
    except UserError as error:
        return _refuse(error)
    with distributed_lib.only_process_zero_prints():
        try:
            result = run(config, workdir)
        except UserError as error:
            return _refuse(error)
        text = f"Written to {workdir}: report.html, pruned/"
        print(f"\n{tables.table(result)}\n\n{text}")
    return 0


def _refuse(error):
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv))
