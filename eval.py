"""Loads a saved model and gives score, size, sparsity and latency.

    python eval.py --model runs/sst2_95/pruned
    python eval.py --model runs/sst2_95/pruned --data path/to/sst2 --json out.json

With `--against runs/sst2_95/teacher` both are timed in turn and the speedup stands
beside the latency. A model may also be a Hugging Face folder or name, dense or already
sliced, as the authors of CoFi published theirs; it does not say what it was made for:

    python eval.py --model princeton-nlp/CoFi-SST2-s95 --task sst2

`--labels contradiction,entailment,neutral` gives the model's classes in its own order,
where that is not the task's, as with their MNLI models.
"""

import dataclasses
import logging
import pathlib
import sys
from typing import Any, NamedTuple

import jax
from absl import flags

from cofi_jax import (
    benchmark,
    checkpoint,
    inputs,
    loop,
    pretrained,
    report,
    rows,
    sparsity,
    stages,
    tasks,
    training,
)
from cofi_jax import config as config_lib
from cofi_jax import data as data_lib
from cofi_jax.config import UserError, reject
from cofi_jax.model import Encoder, EncoderConfig


class Loaded(NamedTuple):
    """A model, the task it was made for, and the dense sizes it was cut from."""

    model: Encoder
    params: dict
    tokenizer: Any
    data: config_lib.Data
    dense: EncoderConfig


def load(
    path: str,
    *,
    data: config_lib.Data | None,
    labels: tuple[str, ...] = (),
    field: str = "model",
) -> Loaded:
    """A saved model, or a Hugging Face folder or name of a model for `data`'s task.

    Raises:
      UserError: for what is neither, and for a task that does not fit.
    """
    if checkpoint.is_model(path):
        for flag, value in (("task", data and data.task), ("labels", labels)):
            if value:
                legal = "is for Hugging Face models; a saved model knows its own"
                raise reject(flag, value, legal)
        config, spec, about = checkpoint.read_about(path, field=field)
        wanted = {"data"} | ({"dense"} if spec else set())
        if missing := sorted(wanted - about.keys()):
            legal = f"saved without {', '.join(missing)} in `about`, needed here"
            raise reject(field, path, legal)
        data = config_lib.section(
            config_lib.Data, about["data"], field=field, path=path
        )
        tasks.find(data)
        model, params, _ = checkpoint.load_model(path, field=field)
        dense = EncoderConfig.from_json(about["dense"]) if spec else config
        tokenizer = checkpoint.load_tokenizer(path)
        return Loaded(model, params, tokenizer, data, dense)
    folder = pathlib.Path(path).expanduser()
    local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if (folder.is_dir() or local and not data) and not (
        folder / "config.json"
    ).exists():
        checkpoint.read_about(path, field=field)  # says what it found instead
    if not data:
        legal = f"must name the task that {path} was made for: {', '.join(tasks.TASKS)}"
        raise reject("task", "", legal)
    row = tasks.find(data)
    folder = pretrained.resolve(path, field)
    config, params = pretrained.load_classifier(
        folder,
        field=field,
        problem=row.problem,
        labels=row.labels,
        label_order=labels,
        model=config_lib.Model(),
    )
    dense = pretrained.read_config(
        folder, field, row.num_outputs, config_lib.Model(), row.problem
    )
    tokenizer = pretrained.load_tokenizer(folder, field)
    inputs.check_tokenizer(tokenizer, config, field=field, path=path)
    length = min(row.max_length, config.longest)
    data = dataclasses.replace(data, max_length=length)
    return Loaded(Encoder(config), params, tokenizer, data, dense)


def evaluate(
    model_path: str,
    *,
    data_path: str = "",
    against: str = "",
    task: str = "",
    labels: tuple[str, ...] = (),
    batch_size: int = 0,
    seq_length: int = 0,
    repeats: int = 30,
) -> dict:
    """What the command prints, as plain data.

    Args:
      model_path: a folder that `save_model` wrote, or a Hugging Face folder or name.
      data_path: hub name or folder; empty for the one the model was made with.
      against: a second model, timed in turn with the first.
      task: of the task table, for Hugging Face models.
      labels: the classes of a Hugging Face model in its order; () for the task's.
      batch_size: of the timed passes; 0 for 128 on a GPU and 32 on a CPU.
      seq_length: of the timed passes; 0 for 128 on a GPU and 64 on a CPU, or the
        model's longest input where that is shorter.
      repeats: timed passes.

    Raises:
      UserError: for a path, data set or length that does not fit.
    """
    data = config_lib.Data(task=task) if task else None
    loaded = load(model_path, data=data, labels=labels)
    model, params = loaded.model, loaded.params
    models = {"model": (model, params)}
    if against and checkpoint.is_model(against):
        models = {
            "against": checkpoint.load_model(against, field="against")[:2]
        } | models
    elif against:
        other = load(against, data=loaded.data, field="against")
        models = {"against": (other.model, other.params)} | models
    on_cpu = jax.default_backend() == "cpu"
    longest = min(m.config.longest for m, _ in models.values())
    seq_length = seq_length or min(64 if on_cpu else 128, longest)
    if seq_length > longest:
        raise reject("seq_length", seq_length, f"must be at most {longest}")

    data = loaded.data
    if data_path:
        data = dataclasses.replace(data, path=data_path)
    row, columns = rows.load(data, tasks.find(data).validation)
    scores, counts = {}, {}
    for split in row.validation:
        examples = data_lib.tokenise(
            columns.pop(split),
            row,
            loaded.tokenizer,
            max_length=tasks.max_length(data),
        )
        logits = loop.predict_all(
            training.make_predict(model),
            params,
            {},
            examples,
            batch_size=64,
            buckets=data_lib.bucket_lengths(data),
        )
        scores[split] = tasks.scores(row, logits, examples)
        questions = examples.questions  # which may have several windows each
        counts[split] = len(questions.contexts if questions else examples)
    encoder = sparsity.num_params({}, model.config)
    return {
        "model": str(model_path),
        "task": data.task,
        "metric": row.metrics[0],
        "score": stages.main_score(scores),
        "scores": scores,
        "examples": sum(counts.values()),
        "params": {
            "encoder": encoder,
            "total": sum(x.size for x in jax.tree.leaves(params)),
        },
        "sparsity": 1 - encoder / sparsity.num_params({}, loaded.dense),
        "kept": model.config.widths(),
        **benchmark.inference(
            models,
            batch_size=batch_size or (32 if on_cpu else 128),
            seq_length=seq_length,
            repeats=repeats,
        ),
    }


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    # Beneath a damaged file the storage library prints hundreds of lines there.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    values = flags.FlagValues()
    flags.DEFINE_string("model", None, "a saved model", flag_values=values)
    flags.DEFINE_string("task", "", "of a Hugging Face model", flag_values=values)
    flags.DEFINE_list("labels", [], "its classes in its order", flag_values=values)
    flags.DEFINE_string("data", "", "hub name or folder", flag_values=values)
    flags.DEFINE_string("against", "", "a second saved model", flag_values=values)
    flags.DEFINE_string("json", "", "also write the result here", flag_values=values)
    for name, default in (("batch_size", 0), ("seq_length", 0), ("repeats", 30)):
        flags.DEFINE_integer(
            name,
            default,
            "of the timed passes",
            lower_bound=min(default, 1),
            flag_values=values,
        )
    usage = "python eval.py --model path/to/model [--task T] [--data D] "
    usage += "[--labels A,B] [--against M] [--json F]"
    try:
        try:
            rest = values(argv)[1:]
        except flags.Error as error:
            raise UserError(
                f"{' '.join(str(error).split())}; usage: {usage}"
            ) from error
        if rest:
            raise UserError(f"{rest[0]!r}: unknown argument; usage: {usage}")
        if values.model is None:
            raise reject("--model", None, f"must be a saved model; usage: {usage}")
        target = pathlib.Path(values.json).absolute()
        if values.json and (target.is_dir() or not target.parent.is_dir()):
            raise reject(
                "--json", values.json, "must be a file in a folder that exists"
            )
        result = evaluate(
            values.model,
            data_path=values.data,
            against=values.against,
            task=values.task,
            labels=tuple(values.labels),
            batch_size=values.batch_size,
            seq_length=values.seq_length,
            repeats=values.repeats,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report.evaluation(result))
    if values.json:
        report.write_json(pathlib.Path(values.json), result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
