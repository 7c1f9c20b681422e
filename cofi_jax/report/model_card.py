"""The model card of a saved model, after the conventions of the Hugging Face hub.

It says what was lost and gained, what each folder is for and how it is loaded. The
tests run the lines that load a folder.
"""

import json
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from cofi_jax.data import tasks
from cofi_jax.data.problems import PROBLEMS
from cofi_jax.errors import printable
from cofi_jax.models.config import EncoderConfig
from cofi_jax.report import tables
from cofi_jax.report.tables import escape

FOLDER = "path/to/this/folder"  # as the lines of every part call it


class Part(NamedTuple):
    """What the card says of a folder that holds the model.

    Attributes:
      user: who can load it.
      what: what it holds.
      snippet: lines of Python that load it and print its answer to an example. In them
        {texts} is a text or a pair, {example} the same as one value, and {auto}
        transformers' class of the head.
      note: `note(check)` returns a sentence on the content of its `check.json`, or "".
      section: `section(check)` returns Markdown that follows what was checked, or "".
      pooled: the user and the snippet for a model that makes vectors; () for the same.
    """

    user: str
    what: str
    snippet: str
    note: Callable[[Mapping[str, Any]], str] = lambda check: ""
    section: Callable[[Mapping[str, Any]], str] = lambda check: ""
    pooled: tuple[str, str] | tuple[()] = ()

    def of(self, config: EncoderConfig) -> tuple[str, str]:
        """The user and the snippet for a model of these sizes."""
        if self.pooled and config.pooling:
            return self.pooled
        return self.user, self.snippet


_SAVED_MODEL = Part(
    "cofi-jax",
    "`model.json`, `params/` (orbax), `tokenizer/`",
    """\
import cofi_jax
model = cofi_jax.pipeline("path/to/this/folder")
print(model([{example}]))""",
)

# The names that the hub has for our metrics, where they differ.
_METRICS = {
    "matthews": "matthews_correlation",
    "spearman": "spearmanr",
    "pearson": "pearsonr",
}


def text(
    config: EncoderConfig,
    about: Mapping[str, Any],
    checks: Mapping[str, Any],
    parts: Mapping[str, Part] = types.MappingProxyType({}),
) -> str:
    """The text of `README.md`.

    Args:
      config: the sizes of the model.
      about: what the saved model says of itself; if it was pruned, `report` is the
        content of its run's `report.json`.
      checks: the content of each `check.json` by format; "" is the saved model's own.
      parts: what there is to say of the formats.
    """
    name = about.get("task", "")
    task = tasks.TASKS.get(name)
    result = about.get("report")
    title = f"{'Pruned' if 'sparsity' in about else 'Dense'} encoder"
    title += f" for {name}" if task else ""
    found = [f"---\n{_metadata(config, about, task)}\n---", f"# {title}"]
    if result:
        found.append(
            f"{tables.headline(result)} Pruned and distilled by "
            "[CoFi](https://arxiv.org/abs/2204.00408) with cofi-jax."
        )
        found.append(tables.table(result))
    elif scores := about.get("scores"):
        rows = (f"- {escape(k)}: {value:.4f}" for k, value in tables.score_rows(scores))
        found.append("\n".join(rows))
        if not about.get("data", {}).get("label_column", "label"):
            name = "the answers of the model that it was made from"
            found.append(tables.AGREEMENT.format(name=name))
        elif "agreement" in dict(tables.score_rows(scores)):
            found.append(tables.OF_VECTORS.format(name="this model"))
    found.append(_structure(config, about))
    if "vocabulary" in about:
        found.append(_vocabulary(about["vocabulary"]))
    found.append("## Use it")
    found.append(_usage("This folder", _SAVED_MODEL, config, task, about))
    for name, part in parts.items():
        if name in checks:
            found.append(_usage(f"`{name}/`", part, config, task, about))
    if any(checks.values()):
        found += ["## What was checked", checked(checks, parts)]
    return "\n\n".join(found) + "\n"


def _metadata(config, about, task):
    """The YAML by which the hub finds the model and shows its scores."""
    from huggingface_hub import EvalResult, ModelCardData  # slow to import

    fields = {
        "library_name": "cofi-jax",
        "pipeline_tag": PROBLEMS[config.problem].pipeline_tag,
        "tags": ["cofi-jax", "jax", "structured-pruning", "arxiv:2204.00408"],
        "base_model": printable(about.get("base_model", "")) or None,
    }
    if task and task.hub and about["task"] != "demo":  # whose rows are generated
        fields["datasets"] = [task.hub]
        fields["metrics"] = [_METRICS.get(name, name) for name in task.metrics]
        if result := about.get("report"):
            split, scores = next(iter(result["pruned"]["scores"].items()))
            fields["model_name"] = f"pruned-{about['data']['task']}"
            fields["eval_results"] = [
                EvalResult(
                    task_type=fields["pipeline_tag"],
                    dataset_type=task.hub,
                    dataset_name=about["task"],
                    dataset_config=about["task"] if task.hub == tasks.GLUE else None,
                    dataset_split=split,
                    metric_type=_METRICS.get(name, name),
                    metric_value=round(value, 4),
                )
                for name, value in scores.items()
            ]
    return ModelCardData(**fields).to_yaml()


def _structure(config, about):
    words = (
        f"Hidden width {config.hidden_size}; heads of {config.head_size} per layer: "
        f"{' '.join(map(str, config.heads))}; feed-forward widths: "
        f"{' '.join(map(str, config.intermediate))}; 0 is an absent block. At most "
        f"{config.longest} tokens."
    )
    if config.pooling:
        words = f"{words} {_vector(config)}"
    else:
        labels = escape(", ".join(map(json.dumps, about.get("labels", ()))) or "none")
        words = f"{words} Classes in the order of the logits: {labels}."
    names = about.get("labels", ())
    problem = PROBLEMS[config.problem].with_settings(about.get("settings", {}), names)
    return " ".join(filter(None, [words, escape(problem.describe(names))]))


_POOLED = {
    "mean": "the mean of the last hidden states of its tokens",
    "max": "the largest values among the last hidden states of its tokens",
    "cls": "the last hidden state of its first token",
}


def _vector(config):
    """How a model that pools makes a vector."""
    words = f"The vector of a text has {config.num_labels} dimensions: it is "
    words += _POOLED[config.pooling]
    if config.output_activation:
        words += ", mapped by a linear layer"
    if config.output_activation not in ("", "identity"):
        words += f" and {config.output_activation}"
    return f"{words}, divided by its length." if config.normalize else f"{words}."


def _vocabulary(found):
    """What the card says of a trimmed model, see `export.trim`."""
    tokens, rows = found["tokens"], found["validation"]
    share = tables.percent(tokens["after"] / tokens["before"])
    words = (
        f"Its vocabulary was trimmed to {tokens['after']:,} of {tokens['before']:,} "
        f"tokens ({share}). Those of {found['texts']:,} texts stay, those of the "
        f"validation rows ({rows['added']:,} more), the special ones, and those of "
        "single characters and bytes. All these texts and rows are tokenised as "
        f"before, and the logits of {rows['compared']:,} validation rows differ from "
        f"those of the untrimmed model by {rows['max_abs_difference']:.1e} at most. "
        f"That one has {found['bytes_before'] / 1e6:.1f} MB, and the figures above are "
        "its own. "
        "A dense model that is compared with this one has the same tokens."
    )
    if held_out := found.get("held_out"):
        changed, unknown, before = (
            f"{100 * held_out[name]:.2f} %"
            for name in ("tokenised_otherwise", "unknown", "unknown_before")
        )
        words += (
            f" With the tokens that nine tenths of the texts need, {changed} of the "
            f"{held_out['texts']:,} others are tokenised otherwise, and {unknown} of "
            f"their pieces are unknown; with all tokens, {before} are."
        )
    return words


def _usage(folder, part, config, task, about):
    columns = task.columns if task else about.get("data", {}).get("columns", ("text",))
    words = PROBLEMS[config.problem].example[: len(columns)]
    lines = snippet(part, config, words)
    user, _ = part.of(config)
    return f"{folder}, for {user}: {part.what}.\n\n```python\n{lines}\n```"


def snippet(part: Part, config: EncoderConfig, words: Sequence[str]) -> str:
    """The lines of the card that load a folder and answer a text, or a pair of them.

    They call the saved model's folder `FOLDER`.
    """
    texts = ", ".join(json.dumps(word) for word in words)
    return part.of(config)[1].format(
        auto=PROBLEMS[config.problem].auto_class,
        texts=texts,
        example=f"({texts})" if len(words) > 1 else texts,
    )


def checked(checks: Mapping[str, Any], parts: Mapping[str, Part]) -> str:
    """What each `check.json` found, as a table; the arguments are those of `text`."""
    rows, places = [], {}
    for name, check in checks.items():
        metric, score = next(iter(check["scores"].items()))
        fast = "-"
        if "speedup" in check:
            how = check["benchmark"]
            fast = f"{check['speedup']:.1f}x ({tables.spread(check)}), "
            fast += f"{how['batch_size']} x {how['seq_length']}"
            dtypes = places.setdefault(escape(how["device"]), {})
            dtypes[how["dtype"]] = None  # in order
        rows.append(
            (
                name or "this folder",
                f"{check['rows']:,}",
                f"{check['max_abs_difference']:.1e}",
                f"{metric} {score:.4f}",
                f"{check['bytes'] / 1e6:.1f} MB",
                fast,
            )
        )
    head = ("part", "rows", "largest difference", "score", "size", "speedup, batch")
    against = " and ".join(sorted({c["checked_against"] for c in checks.values()}))
    note = f"Each part was loaded by its own runtime and compared with {against}."
    if places:
        named = (f"{place}, {' and '.join(how)}" for place, how in places.items())
        where = " and ".join(named)
        note += (
            " Speedup: pruned against dense in the same runtime, timed in turn on "
            f"{where}, in batches of sequences x tokens; in brackets "
            "the 5th and 95th percentile."
        )
    notes = [note, *(part.note(checks.get(name, {})) for name, part in parts.items())]
    if slow := sorted({c["tokenizer"] for c in checks.values() if "tokenizer" in c}):
        note = f"The tokenizer ({'; '.join(slow)}) is read by its class in transformers"
        notes.append(f"{note}, with the packages that this one needs.")
    judges = {c["agreement"]: None for c in checks.values() if "agreement" in c}
    notes += [tables.AGREEMENT.format(name=name) for name in judges]
    note = " ".join(filter(None, notes))
    table = tables.Table("<>>>>>", head, rows)
    found = [str(table), f"{note} More in each `check.json`."]
    found += [part.section(checks.get(name, {})) for name, part in parts.items()]
    return "\n\n".join(filter(None, found))
