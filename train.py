"""Prunes a model: teacher, prune, slice, fine-tune, score, measure, save.

    python train.py --config configs/sst2_95.py
    python train.py --config configs/sst2_95.py --config.data.path=path/to/sst2

Killed at any moment, the same command goes on where it was. All devices of the machine
are used; those of several machines, with --distributed on each (docs/devices.md).
"""

import sys

from cofi_jax import commands
from cofi_jax import distributed as distributed_lib
from cofi_jax.errors import printable
from cofi_jax.report import tables
from cofi_jax.run import cli, stages
from cofi_jax.run.run import run


@commands.program
def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    config, workdir, distributed = cli.parse(argv)
    if distributed:
        distributed_lib.start()
    with distributed_lib.only_process_zero_prints():
        return _run(config, workdir)


@commands.program  # An error that leaves the block above would end all processes.
def _run(config, workdir):
    result = run(config, workdir)
    stairs = stages.stairs(config.prune.targets, config.prune.target_speedup)
    made = stairs[: len(result.get("family", stairs[:1]))]
    models = [f"{stages.saved_as(workdir, stair).name}/" for stair in made]
    names = ", ".join(["report.html", *models])
    print(f"\n{tables.table(result)}\n\nWritten to {printable(workdir)}: {names}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
