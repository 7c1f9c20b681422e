"""Runs several configs with several seeds, one after another, and tables the results.

    python -m cofi_jax.sweep --config configs/short.py:cola,0.95 \
        --config configs/short.py:cola,0.95,no_layers \
        --seeds 1,2,3 --workdir runs/ablation --config.data.path=path/to/cola

Each member is a run of train.py in `<workdir>/<config>-seed<n>`, and gets all other
flags `--config.x=y`. `table.md` and `sweep.json` are written anew after each member,
and `compare.html` in the end. A sweep that was killed goes on where it was if the same
command is given again.
"""

import collections
import dataclasses
import itertools
import pathlib
import platform
import statistics
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from cofi_jax import commands, files
from cofi_jax import config as config_lib
from cofi_jax.config import Config
from cofi_jax.data import tasks
from cofi_jax.errors import UserError, printable, reject, warn
from cofi_jax.evaluation import predict
from cofi_jax.report import pages, paper
from cofi_jax.report.tables import Table, escape
from cofi_jax.run import cli
from cofi_jax.run import run as run_lib

_USAGE = (
    "python -m cofi_jax.sweep --config FILE [--config FILE] [--seeds 1,2,3] "
    "--workdir DIR [--config.X=Y]"
)


_FOOTNOTE = """\
Means over the seeds; sd: their standard deviation, if there are several.

paper: the figures of Xia, Zhong, Chen (ACL 2022) for BERT-base with the whole recipe,
speedup on its V100 in batches of 128; they were not measured here."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of the sweep."""

    name: str  # of its config; that of all its seeds
    config: Config
    workdir: pathlib.Path


def run(
    members: Sequence[Member], workdir: pathlib.Path
) -> tuple[dict[str, Any], list[str]]:
    """All members, or those that are left.

    A member that fails is noted, and the next one begins.

    Returns:
      The content of `sweep.json`, and the names of the files that were written.

    Raises:
      UserError: the workdir cannot be written, or has pictures of something else.
    """
    pages.prepare_folder(workdir, "--workdir")
    # The finished ones first: they only hand over their reports.
    order = sorted(members, key=lambda m: not (m.workdir / "report.json").exists())
    outcomes: dict[pathlib.Path, dict[str, Any] | str] = {}
    # Members of one shape compile once.
    with run_lib.compiled_in(workdir / f"compiled-{platform.node()}"):
        for number, member in enumerate(order, start=1):
            where = printable(member.workdir)
            print(f"[{number}/{len(order)}] {where}", file=sys.stderr)
            try:
                outcomes[member.workdir] = run_lib.run(member.config, member.workdir)
            except Exception as error:  # Those that come after may well succeed.
                outcomes[member.workdir] = line = _line(error)
                name = printable(member.workdir.name)
                print(f"error: {name}: {line}", file=sys.stderr)
            # The programs of one member are of no use to the next.
            predict.make_predict.cache_clear()
            jax.clear_caches()
            content = summary(members, outcomes)
            files.write_atomically(workdir / "table.md", markdown(content))
            files.write_json(workdir / "sweep.json", content)
    finished = [
        (member.name, outcomes[member.workdir])
        for member in members
        if isinstance(outcomes.get(member.workdir), dict)
    ]
    written = ["table.md", "sweep.json"]
    try:
        if finished:
            written += pages.write_comparison(workdir, finished)[:1]
    except Exception as error:  # the table is what hours were spent for
        warn(f"no compare.html: {_line(error)}")
    return content, written


def _line(error):
    if isinstance(error, UserError):
        return printable(error)
    traceback.print_exception(error)  # a bug, or a machine that is too small
    return f"{type(error).__name__}: {printable(error)[:200]}"


def summary(
    members: Iterable[Member], outcomes: dict[pathlib.Path, dict[str, Any] | str]
) -> dict[str, Any]:
    """The content of `sweep.json`.

    Args:
      members: all of them.
      outcomes: by workdir, the `report.json` of each finished member and the message
        of each failed one.
    """
    rows, states = [], []
    for name, group in itertools.groupby(members, key=lambda member: member.name):
        reports, counts = [], collections.Counter()
        for member in group:
            outcome, state = outcomes.get(member.workdir), {"state": "waiting"}
            if isinstance(outcome, dict):
                state["state"] = "finished"
                reports.append(outcome)
            elif outcome is not None:
                state = {"state": "failed", "error": outcome}
            counts[state["state"]] += 1
            where = {"seed": member.config.seed, "workdir": member.workdir.name}
            states.append({"config": name} | where | state)
        rows.append(
            {
                "config": name,
                "seeds": counts["finished"],
                "failed": counts["failed"],
                "waiting": counts["waiting"],
                **_statistics(reports),
                "paper": paper.figures(member.config),
            }
        )
    return {"rows": rows, "members": states}


def _statistics(reports):
    if not reports:
        return {}

    def of(value):
        values = [value(report) for report in reports]
        sd = statistics.stdev(values) if len(values) > 1 else None
        return {"mean": statistics.fmean(values), "sd": sd, "values": values}

    dense = reports[0]["dense"]
    return {
        "metric": reports[0]["metric"],
        "layers": len(dense["heads"]),
        "teacher": of(lambda r: r["teacher"]["score"]),
        "score": of(lambda r: r["pruned"]["score"]),
        "sparsity": of(lambda r: r["sparsity"]),
        "parameters": of(lambda r: r["params"]["encoder"]["pruned"]),
        "attention": of(lambda r: sum(map(bool, r["kept"]["heads"]))),
        "feed_forward": of(lambda r: sum(map(bool, r["kept"]["intermediate"]))),
        "hidden": of(lambda r: r["kept"]["hidden"]),
        "speedup": of(lambda r: r["speedup"]),
    }


def markdown(content: dict[str, Any]) -> str:
    """The text of `table.md`, with one row for each config."""
    rows = [_cells(row) for row in content["rows"]]
    head, cells = list(rows[0]), [list(row.values()) for row in rows]
    failed = [
        f"- {escape(member['workdir'])}: failed, {escape(member['error'])}"
        for member in content["members"]
        if member["state"] == "failed"
    ]
    sources = [
        f"- paper, {escape(row['config'])}: {row['paper']['source']}"
        for row in content["rows"]
        if row["paper"]
    ]
    table = str(Table("<<<" + ">" * 12, head, cells))
    parts = [table, "\n".join(failed), _FOOTNOTE, "\n".join(sources)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _cells(row):
    """The cells of a `row` of `sweep.json`, by the title of their column."""

    def show(key, form, part="mean"):
        value = (row.get(key) or {}).get(part)
        return "-" if value is None else format(value, form)

    def blocks(key):
        return f"{show(key, '.4g')} of {row['layers']}" if key in row else "-"

    waiting = (f", {row[k]} {k}" for k in ("failed", "waiting") if row[k])
    return {
        "config": row["config"],
        "seeds": f"{row['seeds']}{''.join(waiting)}",
        "metric": row.get("metric", "-"),
        "teacher": show("teacher", ".4f"),
        "score": show("score", ".4f"),
        "sd": show("score", ".4f", "sd"),
        "paper: score": show("paper", ".3f", "score"),
        "sparsity": show("sparsity", ".4f"),
        "encoder parameters": show("parameters", ",.0f"),
        "attention blocks": blocks("attention"),
        "feed-forward blocks": blocks("feed_forward"),
        "hidden width": show("hidden", ".4g"),
        "speedup": show("speedup", ".2f"),
        "speedup sd": show("speedup", ".2f", "sd"),
        "paper: speedup": show("paper", ".1f", "speedup"),
    }


def parse(argv: list[str]) -> tuple[list[Member], pathlib.Path]:
    """The members, all of them legal, and the workdir that a command line asks for.

    Raises:
      UserError: for flags, files and fields that do not exist or do not fit.
    """
    parser = commands.Parser(usage=_USAGE, description=__doc__)
    parser.add_argument("--config", action="append", required=True)
    parser.add_argument("--seeds", default=str(Config().seed))
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    known, rest = parser.parse_known_args(argv[1:])
    values = dict(cli.overrides(rest, _USAGE))
    if "seed" in values:
        legal = "the seeds are --seeds 1,2,3"
        raise reject("--config.seed", values["seed"], legal)
    seeds = known.seeds.split(",")
    whole = all(seed.isdecimal() and seed.isascii() for seed in seeds)
    if not whole or len(set(map(int, seeds))) < len(seeds):
        legal = "must be whole numbers with commas between them, none twice"
        raise reject("--seeds", known.seeds, legal)
    members = []
    for file, seed in itertools.product(known.config, seeds):
        config = cli.load(file, values | {"seed": int(seed)})
        config_lib.validate(config)
        tasks.find(config.data)
        name = cli.name_of(file)
        folder = known.workdir / f"{name}-seed{seed}"
        run_lib.check_workdir(config, folder)
        if any(folder == member.workdir for member in members):
            raise reject("--config", name, "two configs of this name share a folder")
        members.append(Member(name, config, folder))
    return members, known.workdir


@commands.program
def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    members, workdir = parse(argv)
    content, written = run(members, workdir)
    print(
        f"\n{markdown(content)}\nWritten to {printable(workdir)}: {', '.join(written)}"
    )
    return 2 if any(row["failed"] for row in content["rows"]) else 0
