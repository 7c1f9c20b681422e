"""The figures of a run as text: every table, and the sentences around it.

The functions read the content of a `report.json` and give GitHub-flavoured Markdown
that also lines up on a terminal. `html` makes pages of the same Markdown, so nothing is
written twice.
"""

import dataclasses
import json
import pathlib
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cofi_jax.errors import printable, reject

Report = dict[str, Any]  # the content of a `report.json`
Metrics = Sequence[dict[str, Any]]  # the lines of a `metrics.jsonl`

_TERMINAL = 100  # characters in a line

# The kinds of stages in their order, each with its name for readers.
STAGES = {
    "teacher": "teacher",
    "prepruning": "pre-pruning",
    "prune": "pruning",
    "finetune": "fine-tuning",
}

# What is counted over the layers of a model, given its widths.
TOTALS = {
    "heads": lambda widths: sum(widths["heads"]),
    "FFN width": lambda widths: sum(widths["intermediate"]),
    "hidden width": lambda widths: widths["hidden"],
    "attention blocks": lambda widths: sum(map(bool, widths["heads"])),
    "FFN blocks": lambda widths: sum(map(bool, widths["intermediate"])),
}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of plain text; its `str` is Markdown.

    Attributes:
      align: `<` (left) or `>` (right) for each column.
      head: the titles of the columns.
      rows: the cells of each row, the first of which names the row.
    """

    align: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        """The table as Markdown whose columns line up on a terminal."""
        columns = []
        cells = zip(self.head, *self.rows, strict=True)
        for side, column in zip(self.align, cells, strict=True):
            texts = list(map(escape, column))
            width = max(3, *map(len, texts))
            title, *rest = (f"{text:{side}{width}}" for text in texts)
            rule = "-" * (width - 1) + (":" if side == ">" else "-")
            columns.append((title, rule, *rest))
        return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))

    def fitted(self) -> str:
        """The Markdown, cut into several tables where a terminal is too narrow."""
        names, *columns = zip(self.head, *self.rows, strict=True)
        parts = [[names]]
        for column in columns:
            wider = [*parts[-1], column]
            width = sum(max(map(len, map(escape, cells))) + 3 for cells in wider)
            if width < _TERMINAL or len(wider) == 2:
                parts[-1] = wider
            else:
                parts.append([names, column])
        tables = ((self.align[: len(p)], *zip(*p, strict=True)) for p in parts)
        return "\n\n".join(str(Table(side, h, rows)) for side, h, *rows in tables)


def escape(text: object) -> str:
    r"""Returns Markdown that shows exactly this text, `printable` and in one line.

    For example, `<b> exact_match` becomes `\<b> exact_match`: an underscore within a
    word has no meaning in Markdown, and stays legible on a terminal.
    """
    line = printable(" ".join(str(text).split()))
    return re.sub(r"[\\`*\[\]<&|~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", line)


def percent(fraction: float) -> str:
    """`0.953` as `95.3 %`."""
    return f"{100 * fraction:.1f} %"


def count(number: float, form: str = ".1f") -> str:
    """`10_600_000` as `10.6 M`; `form` is the format of what stands before the unit."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.99995 * size:  # 999,950 would otherwise read 1000.0 k
            return f"{number / size:{form}} {unit}"
    return f"{number:.9g}"


def target(report: Report) -> float:
    """What was asked for: a sparsity, below 1, or a speedup, above 1."""
    if "target_speedup" in report:
        return report["target_speedup"]["asked"]
    return report["target_sparsity"]


def target_text(target: float, form: str = ".4g") -> str:
    """`0.95` as `95 %`, and `8` as `8x`."""
    return f"{target:g}x" if target > 1 else f"{100 * target:{form}} %"


def spread(report: Report) -> str:
    """The 5th and the 95th percentile of the speedup, as `3.9x to 4.2x`."""
    return "{:.1f}x to {:.1f}x".format(*report["speedup_spread"])


def where(report: Report) -> str:
    """The device, the precision and the batches that the latency was measured on."""
    how = report["benchmark"]
    size = f"{how['batch_size']} x {how['seq_length']} tokens"
    runtime = how.get("runtime", "jax")  # which older reports do not name
    words = how["device"], *([runtime] * (runtime != "jax")), how["dtype"]
    return f"{', '.join(words)}, batches of {size}"


def folded(title: str, markdown: str) -> str:
    """Markdown that is shown when the reader opens `title`, which is of plain words."""
    return f"<details>\n<summary>{title}</summary>\n\n{markdown}\n\n</details>"


def headline(report: Report) -> str:
    """The one sentence, in Markdown, of what was removed, gained and lost."""
    asked = ""
    if "target_speedup" in report:
        asked = f", where {target_text(target(report))} was asked for,"
    return (
        f"{percent(report['sparsity'])} of the encoder's parameters are gone; the "
        f"model runs {report['speedup']:.1f}x as fast{asked or ','} with "
        f"{escape(report['metric'])} {report['pruned']['score']:.4f} where the dense "
        f"one has {report['teacher']['score']:.4f}."
    )


AGREEMENT = "Scores are agreement with {name}, and not with labels."


OF_VECTORS = (
    "The agreement is the mean share of the ten other texts nearest to a text, by "
    "the vectors of {name}, that are also among the ten nearest by the model's own."
)


def agreement(result: Mapping[str, Any], name: str = "the dense model") -> str:
    """The sentence that says what scores are, where rows have no labels; or "".

    Args:
      result: the content of a `report.json`, or what `evaluate` returns.
      name: what the model is called that scores agree with.
    """
    if result.get("agreement"):
        return AGREEMENT.format(name=name)
    return OF_VECTORS.format(name=name) if result["metric"] == "agreement" else ""


def comparison(report: Report) -> Table:
    """Everything that both the dense and the pruned model have, with a note."""
    scores = [score_rows(report[model]["scores"]) for model in ("teacher", "pruned")]
    rows = [
        [name, f"{dense:.4f}", f"{pruned:.4f}", f"{pruned - dense:+.4f}"]
        for (name, dense), (_, pruned) in zip(*scores, strict=True)
    ]
    rows[0][0] = report["metric"]
    before = report["pruned"]["score_before_finetune"]
    rows[0][3] += f"; {before:.4f} before fine-tuning"
    note = ""
    if "target_speedup" not in report:
        note = f"target {target_text(target(report), '.1f')}"
    rows.append(["sparsity", "-", percent(report["sparsity"]), note])
    parts = report["params"]
    counts = {"encoder parameters": parts["encoder"], "all parameters": parts["total"]}
    for name, of in TOTALS.items():
        counts[name] = {"dense": of(report["dense"]), "pruned": of(report["kept"])}
    for name, number in counts.items():
        dense, pruned = number["dense"], number["pruned"]
        left = f"{percent(pruned / dense)} left" if dense else ""
        rows.append([name, f"{dense:,}", f"{pruned:,}", left])
    gain = f"{report['speedup']:.1f}x as fast ({spread(report)})"
    how, ends = report["benchmark"], "{0[0]:.4g}\N{EN DASH}{0[1]:.4g} ms"
    for name, found, form, note in (
        ("latency of a batch", report["latency_ms"], "{:.2f} ms", gain),
        ("5th to 95th percentile", how["latency_spread_ms"], ends, ""),
        ("examples per second", how["examples_per_second"], "{:,.0f}", ""),
    ):
        cells = (form.format(found[model]) for model in ("dense", "pruned"))
        rows.append([name, *cells, note])
    if "target_speedup" in report:
        rows.append(["speedup", "-", f"{report['speedup']:.2f}x", _asked(report)])
    return Table("<>><", ("", "dense", "pruned", "note"), rows)


def _asked(report):
    """What the speedup was to be, and what it was before fine-tuning."""
    found = report["target_speedup"]
    note = f"target {found['asked']:g}x; {found['predicted']:.2f}x by the table"
    if chosen := found["chosen"]:
        note += f", {chosen['measured']:.2f}x when it was sliced"
    return note


def passes(report: Report) -> Table:
    """The structures that were timed on the way to a speedup, in their order."""
    found = report["target_speedup"]
    rows = [
        (
            f"{number}{', chosen' if each == found['chosen'] else ''}",
            f"{each['aim']:.2f}x",
            f"{each['predicted']:.2f}x",
            f"{each['measured']:.2f}x",
            f"{100 * each['error']:.2f} %",
        )
        for number, each in enumerate(found["passes"], start=1)
    ]
    head = ("pass", "aimed at", "by the table", "measured", "standard error")
    return Table("<>>>>", head, rows)


def score_rows(scores: dict[str, dict[str, float]]) -> list[tuple[str, float]]:
    """The names and values of all scores; a name has the split if there are several."""
    return [
        (f"{metric}, {split}" if len(scores) > 1 else metric, value)
        for split, values in scores.items()
        for metric, value in values.items()
    ]


def by_class(report: Report) -> Table:
    """The F1 that both models reach on each class; it has no rows without classes."""
    dense, pruned = (report[key].get("by_class", {}) for key in ("teacher", "pruned"))
    rows = []
    for name, rates in dense.items():
        before, after = rates["f1"], pruned[name]["f1"]
        cells = f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"
        rows.append([name, f"{rates['count']:,}", *cells])
    head = ("class", "of these", "dense, F1", "pruned, F1", "change")
    return Table("<>>>>", head, rows)


def layers(report: Report) -> Table:
    """The attention heads and the feed-forward width that each layer keeps.

    Two more columns are what it would keep `for_parameters`, where the report has that.
    """
    structures = {"kept": report["kept"]}
    if other := _for_parameters(report):
        structures["for parameters"] = other
    columns = {}
    for name, widths in structures.items():
        for title, key in (("heads", "heads"), ("FFN width", "intermediate")):
            pairs = zip(widths[key], report["dense"][key], strict=True)
            cells = [f"{kept} / {of}" if kept else "absent" for kept, of in pairs]
            columns[f"{title} {name}"] = cells
    numbers = map(str, range(1, len(report["dense"]["heads"]) + 1))
    rows = list(zip(numbers, *columns.values(), strict=True))
    return Table(">" * (1 + len(columns)), ("layer", *columns), rows)


def _for_parameters(report):
    """What runs that asked for a speedup say, and older ones do not."""
    return report.get("target_speedup", {}).get("for_parameters")


def for_parameters(report: Report) -> str:
    """The sentence about the structure that no time was asked of; "" without one."""
    if not (other := _for_parameters(report)):
        return ""
    left, own = report["params"]["encoder"]["pruned"], report["target_speedup"]
    return (
        "The columns for parameters are what the same log-alphas would keep if the "
        f"parameters were the cost and not the time: {count(other['encoder'])} of them "
        f"where the model has {count(left)}, and by the table of times "
        f"{other['predicted']:.2f}x as fast where it is {own['predicted']:.2f}x."
    )


def drops(report: Report) -> str:
    """The sentences about the score that was to be kept; "" where none was."""
    if "drop" not in report:
        return ""

    def said(member):
        found, name = member["drop"], target_text(target(member))
        way = "rises" if found["fall"] < 0 else "falls"
        return (
            f"that of the model of {name} {way} by {abs(found['fall']):.4f} with a "
            f"standard error of {found['error']:.4f}"
        )

    allowed, metric = report["drop"]["allowed"], escape(report["metric"])
    text = f"The {metric} may fall by {allowed:g}; {said(report)}"
    text += " and counts as kept." if report["drop"]["kept"] else ", which is too far."
    members = report.get("family", [report])
    failed = [each for each in members if not each["drop"]["kept"]]
    if failed and report["drop"]["kept"]:
        beyond = failed[0]["drop"]["beyond"]
        text += f" The first to fail is the next one: {said(failed[0])}, "
        text += f"{beyond:.4f} beyond what the test allows."
    elif "family" in report and not failed:
        text += " All models of the run keep it."
    return text


def table(report: Report) -> str:
    """What `train.py` prints: both models side by side, and every layer."""
    timed = f"Latency on {escape(where(report))}."
    said = [drops(report), agreement(report), for_parameters(report), timed]
    notes = " ".join(filter(None, said))
    return f"{comparison(report)}\n\n{notes}\n\n{layers(report)}"


def kind_of(stage: str) -> str:
    """The kind of a stage: `prune` is that of `prune-60`, which prunes to 60 %."""
    return stage.partition("-")[0]


def stages_of(metrics: Metrics) -> dict[str, str]:
    """The stages that ran, in their order, each with its name for readers."""
    found = {}
    for stage in {line["stage"] for line in metrics}:
        kind, _, target = stage.partition("-")
        place = float(target.rstrip("x") or 0), [*STAGES].index(kind)
        unit = "" if target.endswith("x") else " %"
        name = STAGES[kind] + (f", {target}{unit}" if target else "")
        found[place] = stage, name
    return dict(found[place] for place in sorted(found))


def stages(metrics: Metrics) -> Table:
    """The duration, the speed and the scores of each stage that ran."""
    rows = []
    for stage, name in stages_of(metrics).items():
        lines = [line for line in metrics if line["stage"] == stage]
        rates = [x["examples_per_second"] for x in lines if "examples_per_second" in x]
        scored = [line for line in lines if "score" in line]
        able = [line["score"] for line in scored if line.get("counts", 1)]
        steps = max(line["step"] for line in lines)
        minutes = max(line.get("seconds", 0.0) for line in lines) / 60
        rate = f"{statistics.median(rates):,.0f}" if rates else "-"
        best = f"{max(able):.4f}" if able else "-"
        last = f"{scored[-1]['score']:.4f}" if scored else "-"
        rows.append((name, f"{steps:,}", f"{minutes:.1f} min", rate, best, last))
    head = ("stage", "steps", "time", "examples/s, median", "best score", "last score")
    return Table("<>>>>>", head, rows)


def evaluation(result: dict[str, Any]) -> str:
    """What `eval.py` prints of the result of `evaluate`: a column for each model."""
    models, how = result["models"], result["benchmark"]
    first, several = models[0]["name"], len(models) > 1
    columns = [_evaluation_column(model, reference=first) for model in models]
    names = max(columns, key=len)  # models may differ in their number of layers
    rows = [[name, *(column.get(name, "") for column in columns)] for name in names]
    rows = [row for row in rows if set(row[1:]) != {"-"}]
    head = ["", *(model["name"] for model in models)]
    times = [("batch", "model", "median", "95 %", "examples/s", "speedup")]
    times += [_timing_row(cell, reference=first) for cell in result["grid"]]
    if not several:  # there is nothing to be faster than
        times = [row[:-1] for row in times]
    paths = [
        f"- {escape(model['name'])}: {escape(model['model'])}"
        for model in models
        if model["name"] != model["model"]
    ]
    counts = " and ".join(map(str, result["examples"].values()))
    against = f";\ndifferences are those to {escape(first)}" if several else ""
    over = (
        f" of each model;\nspeedup over {escape(first)}: median of the turns, 5th to "
        "95th percentile"
    )
    judged = "."
    if said := agreement(result, escape(first)):
        judged += f"\n{said}"
    text = f"""\
{Table("<" + ">" * len(models), head, rows).fitted()}

Scores on {counts} examples ({escape(result["data"])}), ± one standard error\
{against}{judged}

{Table("<<>>>>"[: len(times[0])], times[0], times[1:])}

Timed on {escape(how["device"])};
{how["dtype"]}, matrix precision {how["matmul_precision"]}, in {how["repeats"]} turns\
{over if several else ""}."""
    return "\n\n".join(filter(None, ["\n".join(paths), text]))


def _evaluation_column(model, reference):
    """The cells of one model, by the name of their row."""
    cells = {}
    keys = ("scores", "standard_errors", "differences", "difference_errors")
    for found in zip(*(score_rows(model[key]) for key in keys), strict=True):
        name, (score, error, gap, its_error) = found[0][0], [v for _, v in found]
        cells[name] = f"{score:.4f} ± {error:.4f}"
        gap = f"{gap:+.4f} ± {its_error:.4f}"
        cells[f"{name}, difference"] = "-" if model["name"] == reference else gap
    cells["encoder parameters"] = count(model["params"]["encoder"])
    cells["all parameters"] = count(model["params"]["total"])
    cells["sparsity"] = percent(model["sparsity"])
    cells["on disk"] = f"{model['bytes'] / 1e6:.1f} MB"
    for length, products in model["multiply_adds"].items():
        cells[f"multiply-adds, {length} tokens"] = count(products)
    cells["hidden width"] = str(model["kept"]["hidden"])
    widths = zip(model["kept"]["heads"], model["kept"]["intermediate"], strict=True)
    for layer, (heads, units) in enumerate(widths, start=1):
        cells[f"layer {layer}: heads, FFN"] = f"{heads or 'none'}, {units or 'none'}"
    return cells


def _timing_row(cell, reference):
    low, high = cell["speedup_spread"]
    gain = f"{cell['speedup']:.2f}x ({low:.2f}x to {high:.2f}x)"
    times = (cell[key] for key in ("latency_ms", "latency_p95_ms"))
    return (
        f"{cell['batch_size']} x {cell['seq_length']}",
        cell["model"],
        *(f"{time:.{3 if time < 1 else 2}f} ms" for time in times),
        f"{cell['examples_per_second']:,.0f}",
        "-" if cell["model"] == reference else gain,
    )


def read_report(path: pathlib.Path, field: str) -> Report:
    """Reads a `report.json` and checks that all tables can be made of it.

    Raises:
      UserError: naming `field`, where the file is damaged or not the report of a run.
      OSError: the file cannot be read.
    """
    numbers = dict.fromkeys(("parse_int", "parse_float", "parse_constant"), _number)
    try:
        report = json.loads(path.read_bytes(), **numbers)
        # JSON can spell half a surrogate pair, which no file can hold.
        json.dumps(report, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise reject(field, str(path), f"is damaged: {error}") from error
    try:
        for text in (headline, table):
            text(report)
        task, metric, _ = (report[key] for key in ("task", "metric", "seed"))
        if not (isinstance(task, str) and isinstance(metric, str)):
            raise TypeError("a name is not text")
        if not layers(report).rows:
            raise ValueError("there is no layer")
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        legal = f"is not the report of a run ({type(error).__name__}: {error})"
        raise reject(field, str(path), legal) from error
    return report


def _number(text):
    if not abs(float(text)) < 1e15:  # which also refuses NaN and infinity
        raise ValueError(f"{text[:20]} is not a number of a report")
    return int(text) if text.lstrip("-").isdecimal() else float(text)
