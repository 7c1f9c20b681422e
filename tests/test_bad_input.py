"""What a user gets wrong: one line, exit status 2, nothing written over.

Nearly all cases call `train.main` in this process, since to start one takes seconds.
"""

import dataclasses
import fcntl
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file, save_file

import train
from cofi_jax import UserError
from cofi_jax.checkpoints import huggingface, saved_model
from cofi_jax.config import Prune
from cofi_jax.data import tasks, toy
from cofi_jax.errors import at_most, reject
from cofi_jax.models.bert import init_params
from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import KINDS
from cofi_jax.pruning import masks, slicing
from cofi_jax.run import run, setup, stages
from cofi_jax.training import step as step_lib

pytestmark = pytest.mark.usefixtures("quick_compile", "without_pictures")

ROOT = pathlib.Path(__file__).parents[1]


TINY_BERT = ROOT / "tests" / "fixtures" / "tiny_bert"


TINY = """
from configs import demo


def get_config():
    config = demo.get_config()
    config.model.num_layers = 2
    config.model.num_heads = 2
    config.model.hidden_size = 16
    config.model.intermediate_size = 32
    config.data.max_length = 16
    config.data.buckets = (16,)
    config.teacher.epochs = 2
    config.teacher.train_rows = 64
    config.teacher.batch_size = 16
    config.prune.targets = (0.5,)
    config.prune.epochs = 2
    config.prune.warmup_epochs = 1
    config.prune.train_rows = 64
    config.prune.batch_size = 16
    config.prune.mask_learning_rate = 2.0
    config.finetune.train_rows = 64
    config.benchmark.seq_length = 16
    config.log_every = 2
    config.eval_every = 2
    config.checkpoint_every = 2
    return config
"""


STEPS = 8  # of its teacher


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    """A small demo task; a program is compiled once, not once a test."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(toy.SIZES, "train", 300)
        patch.setitem(toy.SIZES, "validation", 50)
        for name, value in options.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """Folders that command lines name: `{config}`, `{bert}`, `{pruned}`, ..."""
    top = tmp_path_factory.mktemp("there")
    (top / "config.py").write_text(TINY)
    for name, text in CONFIG_FILES.items():
        (top / f"{name}.py").write_text(text)

    shutil.copytree(TINY_BERT, top / "bert")
    words = [*toy.SPECIAL, *toy.NOUNS, *toy.PRAISE, *toy.BLAME]
    (top / "bert" / "vocab.txt").write_text("\n".join(words) + "\n")

    sizes = EncoderConfig(
        vocab_size=len(toy.demo_tokenizer()),
        hidden_size=8,
        heads=(2,),
        head_size=4,
        intermediate=(8,),
        pooler_size=8,
        num_labels=2,
        max_positions=16,
    )
    params = init_params(sizes, jax.random.key(0))
    gates = {k: np.ones(s) for k, s in masks.mask_shapes(sizes, KINDS).items()}
    gates["intermediate"][:, :4] = 0
    small, spec = slicing.prune(params, gates, sizes)
    for name, *model in (
        ("pruned", small, spec.config(sizes), spec),
        ("dense", params, sizes),
    ):
        saved_model.save_model(
            top / name, *model, tokenizer=toy.demo_tokenizer(), about={}
        )
    value = dataclasses.replace(sizes, num_labels=1, problem="regression")
    answer = dataclasses.replace(sizes, pooler_size=0, problem="span")
    for name, form in (("classes", sizes), ("value", value), ("answer", answer)):
        params = init_params(form, jax.random.key(0))
        rest = {"tokenizer": toy.demo_tokenizer()}
        huggingface.save_hugging_face(top / f"hf_{name}", params, form, **rest)
        saved_model.save_model(top / f"our_{name}", params, form, **rest, about={})
    shutil.copytree(top / "bert", top / "sliced")
    change_weights(cut_units)(top / "sliced")

    for name, files in DATA.items():
        (top / name).mkdir()
        for file, text in files.items():
            (top / name / file).write_text(text)
    (top / "notes").mkdir()
    (top / "notes" / "todo.txt").write_text("not a run")
    for name, text in (("cut", '{"seed": '), ("list", "[1]")):
        (top / name).mkdir()
        (top / name / "config.json").write_text(text)
    paths = {path.stem: str(path) for path in top.iterdir()}
    return paths | {"none": str(top / "none")}


def cut_units(weights):
    layer = "bert.encoder.layer.1."
    for tensor in ("intermediate.dense.weight", "intermediate.dense.bias"):
        weights[layer + tensor] = weights[layer + tensor][:40]
    name = f"{layer}output.dense.weight"
    weights[name] = np.ascontiguousarray(weights[name][:, :40])


def write_csv(folder, split, text):
    (folder / f"{split}.csv").write_text(text)


def tree(path):
    """Every file below `path` with its bytes; None where there is nothing."""
    path = pathlib.Path(path)
    if path.is_file():
        return path.read_bytes()
    files = {f: f.is_file() and f.read_bytes() for f in sorted(path.rglob("*"))}
    return files if path.exists() else None


def complaint(capsys, *arguments):
    """The one error line of a command that exits with 2."""
    capsys.readouterr()
    assert train.main(["train.py", *map(str, arguments)]) == 2
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in err
    return errors[0]


def check(line, *fragments):
    for fragment in fragments:
        assert fragment in line


# Rows. Folders of these names are in the fixture `there`.

GOOD = "sentence,label\nfine,1\ndull,0\nfresh,1\nbad,0\n"


OWN = "text,verdict,stars\nfine,good,5\ndull,bad,1.5\nfresh,good,4\n"


VALUES = "sentence1,sentence2,label\nfine,good,4.5\ndull,fresh,0.5\n"


INFERENCES = "premise,hypothesis,label\nfine,good,0\ndull,fresh,2\n"


def question(start):
    answers = {"text": ["dull"], "answer_start": [start]}
    return {"question": "fine", "context": "fresh dull", "answers": answers}


def both(text, suffix="csv"):
    return {f"{split}.{suffix}": text for split in ("train", "validation")}


DATA = {
    "data": both(GOOD),
    "own": {
        "train.csv": OWN,
        "validation.csv": OWN.replace("dull,bad", "dull,awful"),
    },
    "values": both(VALUES),
    "whole": {
        f"{split}.csv": INFERENCES
        for split in ("train", *tasks.TASKS["mnli"].validation)
    },
    "half": {"train.csv": INFERENCES, "validation_matched.csv": INFERENCES},
    "squad": both(json.dumps([question(6)] * 2), "json"),
    "unanswered": both(json.dumps([question(2)] * 2), "json"),
    "second": {
        "train.json": json.dumps([question(6)] * 2),
        "validation.json": json.dumps(
            [question(6), question(6) | {"answers": {"text": [], "answer_start": []}}]
        ),
    },
    "uneven": both(
        json.dumps([question(6) | {"answers": {"text": ["dull"], "answer_start": []}}]),
        "json",
    ),
    "extra": {
        "wrong.csv": "text,label\nfine,1\n",
        "label.tsv": "sentence\tlabel\nfine\t1\ndull\t7\n",
    },
}


# The command line. Values for "{...}" come from the fixture `there`.

CONFIG_FILES = {
    "syntax": "def get_config(:\n",
    "division": "def get_config():\n    return 1 / 0\n",
    "type_error": "def get_config():\n    return 1 + None\n",
    "value_error": "def get_config():\n    return int('x')\n",
    "missing_import": "import no_such_module\n",
    "dictionary": "def get_config():\n    return {'seed': 1}\n",
    "nothing": "def get_config():\n    pass\n",
    "argument": "def get_config(a):\n    return a\n",
    "misspelt": TINY.replace("config.log_every", "config.log_evry"),
    "misspelt_nested": TINY.replace("finetune.train_rows", "finetune.train_row"),
}


RETURNS = "whose get_config() returns a cofi_jax.Config"


PRUNE_FIELDS = ", ".join(Prune.__dataclass_fields__)


WARM_UP = "--config.prune.warmup_epochs"


# name: (config file, further arguments, what the line must say)
COMMANDS = {
    "no config": (None, [], ["--config=None", RETURNS, "usage"]),
    "no value": (None, ["--config"], ["--config", "expected one argument", "usage"]),
    "no file": ("none", [], ["--config='{none}'", RETURNS]),
    "no file, override": ("none", ["seed=1"], ["--config='{none}'", "No such file"]),
    "syntax": ("syntax", [], ["--config=", "syntax.py", "SyntaxError", "line 1"]),
    "raises": ("division", [], ["--config=", "division.py", "ZeroDivisionError"]),
    "TypeError": ("type_error", [], ["--config='{type_error}'", "TypeError"]),
    "ValueError": ("value_error", [], ["--config='{value_error}'", "'x'"]),
    "import": ("missing_import", [], ["{missing_import}", "no_such_module"]),
    "a dict": ("dictionary", [], ["--config='{dictionary}'", RETURNS]),
    "a dict, override": ("dictionary", ["log_every=1"], ["{dictionary}", RETURNS]),
    "None": ("nothing", [], ["--config='{nothing}'", RETURNS]),
    "None, override": ("nothing", ["seed=1"], ["--config='{nothing}'", RETURNS]),
    "argument": ("argument", [], ["--config='{argument}'", "missing 1 required"]),
    "misspelt": ("misspelt", [], ["log_evry=2", "seed, model, data"]),
    "misspelt, nested": (
        "misspelt_nested",
        [],
        ["finetune.train_row=64", "train_rows, epochs, batch_size"],
    ),
    "unknown flag": ("config", ["--target=0.9"], ["'--target=0.9'", "usage"]),
    "stray": ("config", ["0.9"], ["'0.9'", "usage"]),
    "unknown field": ("config", ["foo=1"], ["config.foo='1'", "seed, model, data"]),
    "unknown nested": ("config", ["prune.foo=1"], ["prune.foo='1'", PRUNE_FIELDS]),
    "below a leaf": ("config", ["seed.foo=1"], ["config.seed.foo='1'", "no fields"]),
    "a section": ("config", ["prune=3"], ["config.prune='3'", PRUNE_FIELDS]),
    "not an int": ("config", ["seed=abc"], ["config.seed='abc'", "int"]),
    "spaced": ("config", ["--config.seed", "abc"], ["config.seed='abc'", "int"]),
    "fraction": ("config", ["prune.epochs=1.5"], ["prune.epochs='1.5'", "int"]),
    "huge": ("config", [f"seed={2**70}"], [f"seed={2**70}", "below 2**31"]),
    "not a float": ("config", ["distill.layers=x"], ["distill.layers='x'", "float"]),
    "not a bool": (
        "config",
        ["teacher.freeze_embeddings=maybe"],
        ["teacher.freeze_embeddings='maybe'", "true or false"],
    ),
    "kinds with a comma and no name": (
        "config",
        ["prune.kinds=head,"],
        ["prune.kinds=''", str(KINDS)],
    ),
    "unknown kind": (
        "config",
        ["prune.kinds=('head','neuron')"],
        ["prune.kinds='neuron'", str(KINDS)],
    ),
    "no kind": ("config", ["prune.kinds=()"], ["prune.kinds=()", str(KINDS)]),
    "kind twice": (
        "config",
        ["prune.kinds=('head','ffn','head')"],
        ["prune.kinds=('head', 'ffn', 'head')", "twice"],
    ),
    **{
        f"target {value}": (
            "config",
            [f"prune.targets={value}"],
            ["prune.targets=", legal],
        )
        for value, legal in (
            ("1.0", "[0, 1)"),
            ("-0.1", "[0, 1)"),
            ("0.8,0.6", "rising"),
            ("0.6,0.6", "rising"),
            ("()", "one or more"),
            ("inf", "float"),
            ("nan", "float"),
            ("1e999", "[0, 1)"),
        )
    },
    **{
        f"speedup {value}": (
            "config",
            ["prune.targets=()", f"prune.target_speedup={value}"],
            ["prune.target_speedup=", legal],
        )
        for value, legal in (
            ("1", "above 1"),
            ("0.5", "above 1"),
            ("4,2", "rising"),
            ("2,2.01", "1 % or more apart"),
            ("inf", "float"),
            ("1e999", "above 1"),
        )
    },
    "drop in per cent": (
        "config",
        ["prune.max_drop=5"],
        ["prune.max_drop=5", "[0, 1)"],
    ),
    "both targets": (
        "config",
        ["prune.target_speedup=8"],
        ["prune.target_speedup=(8,)", "without prune.targets, which are (0.5,)"],
    ),
    "speedup of hidden dimensions": (
        "config",
        ["prune.targets=()", "prune.target_speedup=8"],
        [f"prune.kinds={KINDS}", "without 'hidden'"],
    ),
    "reconstruction of hidden dimensions": (
        "config",
        ["prune.reconstruction_batches=8"],
        ["prune.reconstruction_batches=8", "must be 0 where hidden dimensions are cut"],
    ),
    "compensation of hidden dimensions": (
        "config",
        ["prune.seeds=compensated"],
        ["prune.seeds='compensated'", "importance or magnitude where hidden dim"],
    ),
    "speedup of a structure by hand": (
        "config",
        [
            *("prune.targets=()", "prune.target_speedup=8", "prune.kinds=head,ffn"),
            *("prune.structure.layers=:1", "prune.epochs=1", "prune.warmup_epochs=0"),
        ],
        ["prune.target_speedup=(8,)", "without a prune.structure"],
    ),
    "table that is not read": (
        "config",
        ["prune.latency_table=x.json"],
        ["prune.latency_table='x.json'", "with prune.target_speedup only"],
    ),
    "table that is not there": (
        "config",
        [
            *("prune.targets=()", "prune.target_speedup=8", "prune.kinds=head,ffn"),
            "prune.latency_table=x.json",
        ],
        ["prune.latency_table='x.json'", "No such file"],
    ),
    "unknown runtime": (
        "config",
        ["benchmark.runtime=torch"],
        ["benchmark.runtime='torch'", "onnx-int8"],
    ),
    "unreachable target": (
        "config",
        ["prune.targets=0.99", "prune.kinds=('head',)"],
        ["prune.targets=(0.99,)", "('head',)", "reach at most 0.4"],
    ),
    "unreachable without bounds": (
        "config",
        ["prune.targets=0.6,0.99", "prune.kinds=('head',)", "prune.constraint=exact"],
        ["prune.targets=(0.6, 0.99)", "('head',)", "reach at most 0.5"],
    ),
    "seeds beyond the bounds": (
        "config",
        ["prune.seeds=importance"],
        ["prune.seed_spread=30.0", "at most 9", "lagrangian"],
    ),
    "constraint": (
        "config",
        ["prune.constraint=hard"],
        ["prune.constraint='hard'", "lagrangian, exact"],
    ),
    "zero": ("config", ["prune.batch_size=0"], ["prune.batch_size=0", "at least 1"]),
    "negative": ("config", ["seed=-1"], ["seed=-1", "not be negative"]),
    "rate": (
        "config",
        ["teacher.learning_rate=100"],
        ["teacher.learning_rate=100.0", "(0, 100)"],
    ),
    "heads": (
        "config",
        ["model.hidden_size=9"],
        ["model.hidden_size=9", "model.num_heads=2"],
    ),
    "schedule": ("config", ["prune.schedule=cos"], ["prune.schedule='cos'", "linear"]),
    "warm-up": (
        "config",
        ["prune.warmup_epochs=9"],
        ["prune.warmup_epochs=9", "at most 1"],
    ),
    "task": (
        "config",
        ["data.task=foo"],
        ["data.task='foo'", "demo, sst2, cola", "own"],
    ),
    "no model": (
        "config",
        ["data.task=sst2", "data.path={data}"],
        ["model.path=''", "must name"],
    ),
    "too many rows": (
        "config",
        ["prune.train_rows=301"],
        ["prune.train_rows=301", "at most 300"],
    ),
    "timed too long": (
        "config",
        ["benchmark.seq_length=17"],
        ["benchmark.seq_length=17", "at most 16"],
    ),
    "model too short": (
        "config",
        ["model.path={bert}", "data.max_length=25"],
        ["data.max_length=25", "at most 24"],
    ),
    "no such model": ("config", ["model.path=./none"], ["model.path='./none'"]),
    "no model folder": (
        "config",
        ["model.path={notes}"],
        ["model.path='{notes}'", "config.json cannot be read"],
    ),
    "classes": (
        "config",
        ["teacher.path={bert}"],
        ["teacher.path='{bert}'", "3 classes", "the task has 2"],
    ),
    "pruned teacher": (
        "config",
        ["teacher.path={pruned}"],
        ["teacher.path='{pruned}'", "pruned", "dense"],
    ),
    "data folder": (
        "config",
        ["model.path={bert}", "data.task=sst2", "data.path={none}"],
        ["data.path='{none}'", "local folder", "--config.data.path="],
    ),
    "data file": (
        "config",
        ["model.path={bert}", "data.task=sst2", "data.path={notes}"],
        ["data.path='{notes}'", "train.parquet", "todo.txt"],
    ),
    "data rows": (
        "config",
        ["model.path={bert}", "data.task=sst2", "data.path={data}"],
        ["teacher.train_rows=64", "at most 4"],
    ),
    **{
        f"columns of {task}": (
            "config",
            [f"data.task={task}", f"data.path={{{folder}}}"],
            ["data.path='", "train.csv", f"{missing!r}; it has {there}"],
        )
        for task, missing, folder, there in (
            ("sst2", "sentence", "own", "text, verdict, stars"),
            ("cola", "sentence", "values", "sentence1, sentence2, label"),
            ("mrpc", "sentence1", "data", "sentence, label"),
            ("rte", "sentence1", "data", "sentence, label"),
            ("stsb", "sentence1", "data", "sentence, label"),
            ("qqp", "question1", "values", "sentence1, sentence2, label"),
            ("qnli", "question", "data", "sentence, label"),
            ("mnli", "premise", "data", "sentence, label"),
            ("squad", "question", "data", "sentence, label"),
        )
    },
    "second split": (
        "config",
        ["data.task=mnli", "data.path={half}"],
        ["data.path='{half}'", "validation_mismatched.parquet", "train.csv"],
    ),
    "unanswerable questions": (
        "config",
        ["model.path={bert}", "data.task=squad", "data.path={second}"],
        ["1 of 2 questions have no answer, as in row 1 (the first is 0)", "SQuAD v2"],
    ),
    "uneven answers": (
        "config",
        ["data.task=squad", "data.path={uneven}"],
        ["data.path='{uneven}'", "row 0", "answers=", "equally long"],
    ),
    "no answer anywhere": (
        "config",
        [
            "model.path={bert}",
            "data.task=squad",
            "data.path={unanswered}",
            *(f"{stage}.train_rows=0" for stage in ("teacher", "prune", "finetune")),
        ],
        ["data.path='{unanswered}'"],
    ),
    "the task's own length": (
        "config",
        [
            "model.path={bert}",
            "data.task=squad",
            "data.path={squad}",
            "data.max_length=0",
        ],
        ["data.max_length=384", "at most 24, the model's positions"],
    ),
    "own without columns": (
        "config",
        ["data.task=own", "data.path={own}"],
        ["data.columns=()", "one or two columns"],
    ),
    **{
        f"own, {name}": (
            "config",
            ["data.task=own", "data.path={own}", *(f"data.{field}" for field in more)],
            fragments,
        )
        for name, more, fragments in (
            (
                "three columns",
                ["columns=('text','verdict','stars')"],
                ["data.columns=('text', 'verdict', 'stars')", "one or two columns"],
            ),
            (
                "column twice",
                ["columns=('text',)", "label_column=text"],
                ["data.columns=('text',)", "twice"],
            ),
            (
                "no such column",
                ["columns=('txt',)"],
                ["train.csv", "'txt'; it has text, verdict, stars"],
            ),
            (
                "no labels",
                ["columns=('text',)"],
                ["train.csv", "'label'; it has text, verdict, stars"],
            ),
            (
                "unseen label",
                ["columns=('text',)", "label_column=verdict"],
                ["validation.csv", "row 1", "verdict='awful'", "among bad, good"],
            ),
            (
                "one class",
                ["columns=('text',)", "label_column=verdict", "labels=('good',)"],
                ["data.labels=('good',)", "two classes or more"],
            ),
            (
                "class twice",
                ["columns=('text',)", "labels=('good','bad','good')"],
                ["data.labels=('good', 'bad', 'good')", "twice"],
            ),
            (
                "class not named",
                ["columns=('text',)", "label_column=verdict", "labels=('good','poor')"],
                [
                    "train.csv",
                    "row 1",
                    "verdict='bad'",
                    "among {{0: 'good', 1: 'poor'}}",
                ],
            ),
            (
                "values for classes",
                ["columns=('text',)", "label_column=stars"],
                ["data.label_column='stars'", "data.problem=regression"],
            ),
            (
                "words for values",
                ["columns=('text',)", "label_column=verdict", "problem=regression"],
                ["train.csv", "row 0", "verdict='good'", "finite number"],
            ),
            (
                "classes of values",
                ["columns=('text',)", "problem=regression", "labels=('a','b')"],
                ["data.labels=('a', 'b')", "a regression's, none"],
            ),
            (
                "metric",
                ["columns=('text',)", "metrics=('f2',)"],
                ["data.metrics=('f2',)", "'accuracy', 'matthews', 'f1'"],
            ),
            (
                "f1 of three",
                ["columns=('text',)", "labels=('a','b','c')", "metrics=('f1',)"],
                ["data.metrics=('f1',)", "two classes"],
            ),
            (
                "f1 of three in the rows",
                ["columns=('verdict',)", "label_column=text", "metrics=('f1',)"],
                ["data.metrics=('f1',)", "two classes", "there are 3"],
            ),
            (
                "no path",
                ["columns=('text',)", "path="],
                ["data.path=''", "--config.data.path=path/to/folder"],
            ),
            (
                "metric of values",
                ["columns=('text',)", "problem=regression", "metrics=('f1',)"],
                ["data.metrics=('f1',)", "'spearman', 'pearson'"],
            ),
            (
                "words for lists",
                ["columns=('text',)", "problem=multilabel", "label_column=verdict"],
                ["data.label_column='verdict'", "0 different labels", "hold lists"],
            ),
            (
                "columns of other numbers",
                [
                    "columns=('text',)",
                    "problem=multilabel",
                    "label_column=stars,verdict",
                ],
                ["train.csv, row 0 ", "stars,verdict={{'stars': 5", "each must be 0"],
            ),
            (
                "texts for lists of words",
                ["columns=('text',)", "problem=entities", "label_column=verdict"],
                ["train.csv, row 0 ", "text='", "must be a list of words"],
            ),
            (
                "two columns for words",
                ["columns=('text','stars')", "problem=entities"],
                ["data.columns=('text', 'stars')", "one column, each cell a list"],
            ),
            (
                "problem",
                ["columns=('text',)", "problem=summary"],
                ["data.problem='summary'", "classification, regression"],
            ),
        )
    },
    **{
        f"not of the table: {field}": (
            "config",
            ["data.task=sst2", "data.path={data}", f"data.{field}={value}"],
            [f"data.{field}=", "only the task own takes it, not sst2"],
        )
        for field, value in (
            ("labels", "('bad','good')"),
            ("columns", "('text',)"),
            ("label_column", "verdict"),
            ("metrics", "('f1',)"),
            ("problem", "regression"),
        )
    },
    **{
        f"extra file {name}": (
            "config",
            ["data.task=sst2", "data.path={data}", f"data.extra_file={path}"],
            [f"data.extra_file='{path}'", *fragments],
        )
        for name, path, fragments in (
            ("missing", "{none}.csv", ["cannot read"]),
            ("of another format", "{notes}/todo.txt", ["parquet", "tsv", "jsonl"]),
            ("a folder", "{data}", ["parquet", "tsv", "jsonl"]),
            ("without a column", "{extra}/wrong.csv", ["'sentence'; it has text"]),
            ("with a label", "{extra}/label.tsv", ["label.tsv", "row 1", "label='7'"]),
        )
    },
    "match": ("config", ["distill.match=far"], ["distill.match='far'", "ordered"]),
    "taught": ("config", ["distill.taught=odd"], ["distill.taught='odd'", "random"]),
    "labels of no teacher": (
        "config",
        ["teacher.labels=('praise','blame')"],
        ["teacher.labels=('praise', 'blame')", "teacher.path"],
    ),
    "labels of our teacher": (
        "config",
        ["teacher.path={dense}", "teacher.labels=('praise','blame')"],
        ["teacher.labels=('praise', 'blame')", "a saved model knows its own"],
    ),
    "labels of others": (
        "config",
        ["teacher.path={hf_classes}", "teacher.labels=('praise','damn')"],
        ["teacher.labels=('praise', 'damn')", "('blame', 'praise')"],
    ),
    "sliced teacher": (
        "config",
        [
            "data.task=mnli",
            "data.path={whole}",
            "teacher.path={sliced}",
        ],
        ["teacher.path='{sliced}'", "pruned", "dense"],
    ),
    **{
        f"teacher {model} for {task}": (
            "config",
            [f"data.task={task}", f"data.path={{{data}}}", f"teacher.path={{{model}}}"],
            [f"teacher.path='{{{model}}}'", *fragments],
        )
        for model, task, data, fragments in (
            ("our_value", "sst2", "data", ["regression with 1 ", "classification wi"]),
            ("our_answer", "stsb", "values", ["span with 2 ", "regression with 1"]),
            ("our_classes", "stsb", "values", ["classification with 2 ", "regression"]),
            ("our_classes", "mnli", "whole", ["with 2 outputs", "with 3"]),
            ("our_classes", "squad", "squad", ["classification with 2 ", "span with"]),
            ("hf_value", "sst2", "data", ["problem_type is 'regression'"]),
            (
                "hf_classes",
                "stsb",
                "values",
                ["problem_type is 'single_label_classification'"],
            ),
            ("hf_classes", "squad", "squad", ["qa_outputs", "fine-tuned for span"]),
            ("hf_answer", "sst2", "data", ["fine-tuned for classification"]),
        )
    },
}


@pytest.mark.parametrize("case", COMMANDS)
def test_command(case, there, tmp_path, capsys):
    config, arguments, fragments = COMMANDS[case]
    flags = [f"--config={there[config]}"] if config else []
    for argument in arguments:
        field = re.match(r"[a-z]\w*(\.\w+)*=", argument)
        flags.append(f"--config.{argument}" if field else argument)
    workdir = tmp_path / "run"
    flags = [f"--workdir={workdir}", *(flag.format(**there) for flag in flags)]
    check(complaint(capsys, *flags), *(f.format(**there) for f in fragments))
    assert not workdir.exists()


def test_argument_of_a_config_file(tmp_path, capsys):
    config = f"{ROOT / 'configs' / 'paper.py'}:chess"
    workdir = tmp_path / "run"
    line = complaint(capsys, f"--config={config}", f"--workdir={workdir}")
    check(line, f"--config='{config}'", "task='chess'", "must be one of mnli")
    assert not workdir.exists()


def test_process_exits_with_2_and_one_line(there, tmp_path):
    command = [sys.executable, "train.py", "--config", there["config"]]
    command += ["--workdir", str(tmp_path / "run"), "--config.prune.foo=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    check(done.stderr, "error: --config.prune.foo='1': no such field")
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()


# Data files

BAD_DATA = {
    "label too high": (GOOD.replace("bad,0", "bad,2"), ["row 3", "label='2'", "0: "]),
    "label too low": (GOOD.replace("bad,0", "bad,-1"), ["row 3", "label='-1'", "0: "]),
    "label a fraction": (GOOD.replace("bad,0", "bad,1.5"), ["row 3", "label='1.5'"]),
    "label a word": (GOOD.replace("bad,0", "bad,x"), ["row 3", "label='x'"]),
    "label missing": (GOOD.replace("bad,0", "bad,"), ["row 3", "label="]),
    "text missing": (GOOD.replace("dull", ""), ["row 1", "'sentence'"]),
    "column missing": (GOOD.replace("sentence", "text"), ["'sentence'", "text, label"]),
    "no rows": ("sentence,label\n", ["no rows", "at least 1"]),
    "empty file": ("", ["cannot read"]),
    "file missing": (None, ["parquet", "csv"]),
}


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("case", BAD_DATA)
def test_data(case, split, there, tmp_path, capsys):
    text, fragments = BAD_DATA[case]
    folder = tmp_path / "data"
    shutil.copytree(there["data"], folder)
    if text is None:
        (folder / f"{split}.csv").unlink()
    else:
        write_csv(folder, split, text)
    arguments = {"task": "sst2", "path": folder, "max_length": 16}
    line = complaint(
        capsys,
        f"--config={there['config']}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.model.path={there['bert']}",
        *(f"--config.data.{name}={value}" for name, value in arguments.items()),
    )
    check(line, f"data.path='{folder}'", f"{split}.", *fragments)
    assert not (tmp_path / "run").exists()


# Model folders


def change_config(**fields):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def change_weights(change):
    def rewrite(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return rewrite


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def special_tokens():
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


UP = "bert.encoder.layer.0.intermediate.dense.weight"


BAD_MODELS = {
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        ["must hold model.safetensors", "vocab.txt"],
    ),
    "truncated": (truncate, ["model.safetensors cannot be read"]),
    "tensor missing": (change_weights(lambda w: w.pop(UP)), ["lacks", UP]),
    "tensor misshapen": (
        change_weights(lambda w: w.update({UP: np.zeros((64, 31), np.float32)})),
        [UP, "(64, 31)", "(64, 32)"],
    ),
    "architecture": (change_config(model_type="gpt2"), ["'gpt2'", "'bert'"]),
    "activation": (change_config(hidden_act="tanh"), ["'tanh'", "'gelu'"]),
    "a word for a size": (change_config(hidden_size="wide"), ["config.json"]),
    "no tokenizer": (
        lambda folder: (folder / "vocab.txt").unlink(),
        ["tokenizer.json or vocab.txt"],
    ),
    "words without weights": (
        lambda folder: (folder / "vocab.txt").write_text(
            "\n".join([*special_tokens(), *map(str, range(200))])
        ),
        ["tokenizer", "101"],
    ),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_model_folder(case, there, tmp_path, capsys):
    spoil, fragments = BAD_MODELS[case]
    folder = tmp_path / "bert"
    shutil.copytree(there["bert"], folder)
    spoil(folder)
    line = complaint(
        capsys,
        f"--config={there['config']}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.model.path={folder}",
    )
    check(line, f"model.path='{folder}'", *fragments)
    assert not (tmp_path / "run").exists()


def test_damaged_teacher(there, tmp_path, capsys):
    folder = tmp_path / "teacher"
    shutil.copytree(there["dense"], folder)
    for file in (folder / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    arguments = [f"--config={there['config']}", f"--workdir={tmp_path / 'run'}"]
    line = complaint(capsys, *arguments, f"--config.teacher.path={folder}")
    check(line, str(folder), "damaged")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("field", ["model.path", "teacher.path", "data.path"])
def test_hub_out_of_reach(field, there, tmp_path, capsys, monkeypatch):
    import datasets
    import huggingface_hub

    for library in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(library, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    arguments = {"data.task": "sst2", "data.path": there["data"], field: "no/thing"}
    arguments.setdefault("model.path", there["bert"])
    line = complaint(
        capsys,
        f"--config={there['config']}",
        f"--workdir={tmp_path / 'run'}",
        *(f"--config.{name}={value}" for name, value in arguments.items()),
    )
    check(line, f"{field}='no/thing'", "hub", "local folder", f"--config.{field}=")
    assert not (tmp_path / "run").exists()


# A schedule in which masks cannot close


@pytest.mark.parametrize(
    "epochs, batch_size, schedule",
    [(2, 16, "constant"), (2, 16, "linear"), (4, 5, "constant"), (2, 1, "linear")],
)
def test_short_schedule_is_reported_with_what_would_do(
    epochs, batch_size, schedule, there, tmp_path, capsys, monkeypatch
):
    def stop(*_):
        raise UserError("stop")

    monkeypatch.setattr(run, "_stages", stop)

    def warnings(number, rate):
        status = train.main(
            [
                "train.py",
                f"--config={there['config']}",
                f"--workdir={tmp_path / str(number)}",
                f"--config.prune.epochs={epochs}",
                f"--config.prune.batch_size={batch_size}",
                f"--config.prune.mask_schedule={schedule}",
                f"--config.prune.mask_learning_rate={rate}",
            ]
        )
        *lines, last = capsys.readouterr().err.splitlines()
        assert (status, last) == (2, "error: stop")
        return lines

    # One pass goes to pre-pruning. From log-alpha ln 100 to where a gate is as often
    # open as closed; a linear schedule covers half of what a constant one does.
    steps = (epochs - 1) * math.ceil(64 / batch_size) / (1 + (schedule == "linear"))
    needed = (math.log(100) + 2 / 3 * math.log(1.1 / 0.1)) / steps
    (line,) = warnings(1, 0.001)
    check(line, "warning: prune.mask_learning_rate=0.001")
    advice = re.search(r"([\d.e-]+) or more would do", line)[1]
    assert needed <= float(advice) < 1.1 * needed
    assert len(warnings(2, 0.99 * needed)) == 1
    assert warnings(3, advice) == []


# The folder of a run


def teach(there, workdir):
    """Trains until the teacher is saved: its parameters."""

    def stop(*_):
        raise UserError("the teacher is ready")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "preprune", stop)
        argv = ["train.py", f"--config={there['config']}", f"--workdir={workdir}"]
        assert train.main(argv) == 2
    return saved_model.load_model(workdir / "teacher")[1]


@pytest.fixture
def begun(there, taught, tmp_path):
    """A run that was killed when its teacher was ready."""
    shutil.copytree(taught[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def taught(there, tmp_path_factory):
    """An undisturbed run's folder, and its teacher's parameters."""
    workdir = tmp_path_factory.mktemp("taught") / "run"
    return workdir, teach(there, workdir)


def assert_same(params, others):
    jax.tree.map(np.testing.assert_array_equal, params, others)


def test_run_of_another_config_is_left_alone(there, begun, capsys):
    before = tree(begun)
    arguments = [f"--config={there['config']}", f"--workdir={begun}"]
    line = complaint(capsys, *arguments, "--config.prune.targets=0.75")
    check(line, f"workdir='{begun}'", "prune.targets=[0.5]", "0.75", "--workdir")
    assert tree(begun) == before


def test_the_largest_legal_value_that_is_named_is_legal():
    for highest in (0.0, 1.0, *np.geomspace(1e-9, 999.9, 200)):
        named = float(at_most(highest).removeprefix("at most "))
        assert 0.999 * highest <= named <= highest


def test_a_speedup_that_the_table_refuses_leaves_the_folder_free(
    there, tmp_path, monkeypatch, capsys
):
    """Another one may be asked for there, and finds the table that was measured."""

    def table_of(config, sizes, workdir):
        (workdir / "latency.json").touch()
        raise reject("prune.target_speedup", config.prune.target_speedup, "at most 3")

    monkeypatch.setattr(run.speed, "table_of", table_of)
    workdir = tmp_path / "run"
    arguments = [f"--config={there['config']}", f"--workdir={workdir}"]
    arguments += ["--config.prune.targets=()", "--config.prune.kinds=head,ffn"]
    for asked in ("8", "7"):
        line = complaint(capsys, *arguments, f"--config.prune.target_speedup={asked}")
        check(line, f"prune.target_speedup=({asked},)", "at most 3")
    assert {path.name for path in workdir.iterdir()} == {".lock", "latency.json"}


def test_run_at_work_is_left_alone(there, begun, capsys):
    before = tree(begun)
    with open(begun / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = complaint(capsys, f"--config={there['config']}", f"--workdir={begun}")
    check(line, f"workdir='{begun}'", "another run is at work")
    assert tree(begun) == before


@pytest.mark.parametrize(
    "name, reason",
    [
        ("{config}", "must be a new or a run's folder"),
        ("{config}/run", "must be a folder that can be written"),
        ("{notes}", "must be a new or a run's folder"),
        ("{data}", "must be a new or a run's folder"),
        ("{cut}", "config.json is damaged"),
        ("{list}", "config.json is damaged"),
        ("{bert}", "holds a run with"),  # at least not taken for one of this config
    ],
)
def test_workdir_that_is_none(name, reason, there, capsys):
    top = pathlib.Path(there["config"]).parent
    before = tree(top)
    workdir = name.format(**there)
    line = complaint(capsys, f"--config={there['config']}", f"--workdir={workdir}")
    check(line, f"workdir='{workdir}'", reason)
    assert tree(top) == before


def test_corrupt_checkpoint_is_passed_over(there, begun, taught, capsys):
    shutil.rmtree(begun / "teacher")
    for file in (begun / "checkpoints" / "teacher" / str(STEPS)).rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:-500])
    assert_same(teach(there, begun), taught[1])
    lines = "\n".join(capsys.readouterr()).splitlines()
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    check(warning, f"checkpoints/teacher/{STEPS} is damaged", "the one before")


@pytest.mark.parametrize("first_bad", [1, 5])
def test_loss_that_is_not_finite(first_bad, there, taught, tmp_path, capsys):
    """Step and term are named; mended, the run goes on from the checkpoint before."""
    make_step, init = step_lib.make_step, setup.init_params

    def overflowing(*arguments):
        return jax.tree.map(lambda x: 1e30 * x, init(*arguments))

    def make_failing_step(*arguments):
        step = make_step(*arguments)

        def failing(state, context, batch):
            state, metrics = step(state, context, batch)
            bad = int(state.step) >= first_bad
            return state, metrics | ({"loss_task": np.inf} if bad else {})

        return failing

    workdir = tmp_path / "run"
    arguments = [f"--config={there['config']}", f"--workdir={workdir}"]
    with pytest.MonkeyPatch.context() as patch:
        if first_bad == 1:  # a real overflow
            patch.setattr(setup, "init_params", overflowing)
        else:
            patch.setattr(step_lib, "make_step", make_failing_step)
        line = complaint(capsys, *arguments)
    check(line, "teacher: ", f" at step {first_bad} ", "not finite", "learning rate")
    assert re.search(r"(loss_task=inf|[a-z_]+=nan) at", line)
    saved = workdir / "checkpoints" / "teacher"
    assert sorted(p.name for p in saved.iterdir()) == (
        ["2", "4"] if first_bad > 1 else []
    )
    assert_same(teach(there, workdir), taught[1])
