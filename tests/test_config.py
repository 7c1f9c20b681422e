"""The config files that come with the project, and a config's way through JSON."""

import ast
import dataclasses
import importlib
import json
import math
import pathlib

import pytest

from cofi_jax.config import Config, flatten, to_json, validate
from cofi_jax.data import tasks
from cofi_jax.errors import UserError
from cofi_jax.models.config import EncoderConfig
from cofi_jax.models.spec import KINDS
from cofi_jax.pruning.constraint import max_sparsity
from cofi_jax.run import cli
from configs.fast import ROWS

FOLDER = pathlib.Path(__file__).parents[1] / "configs"


NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


# Appendix A of the paper.
LARGE = {
    "seed": 57,
    "model.path": "bert-base-uncased",
    "prune.kinds": list(KINDS),
    "prune.epochs": 20,
    "prune.prepruning_epochs": 1,
    "prune.warmup_epochs": 2,
    "prune.batch_size": 32,
    "prune.learning_rate": 2e-5,
    "prune.mask_learning_rate": 0.01,
    "prune.multiplier_learning_rate": 0.01,
    "distill.logits": 0.1,
    "distill.layers": 0.9,
    "distill.temperature": 2.0,
    "distill.match": "closest",
    "distill.taught": "even",
    "finetune.epochs": 20,
    "finetune.batch_size": 32,
    "finetune.learning_rate": 2e-5,
    "data.max_length": 0,  # the task's: 128, of SQuAD 384
    "eval_every": 500,
}


SMALL = LARGE | {
    "prune.epochs": 100,
    "prune.prepruning_epochs": 4,
    "prune.warmup_epochs": 20,
    "distill.match": "ordered",
    "eval_every": 50,
}


SQUAD = LARGE | {
    "prune.batch_size": 16,
    "prune.learning_rate": 3e-5,
    "finetune.batch_size": 16,
    "finetune.learning_rate": 3e-5,
}


RECIPES = {
    **dict.fromkeys(("mnli", "qqp", "qnli", "sst2"), LARGE),
    **dict.fromkeys(("cola", "stsb", "mrpc", "rte", "wnli"), SMALL),
    "squad": SQUAD,
}


FINE = ["head", "intermediate"]


ABLATIONS = {
    "no_hidden": {"prune.kinds": ["head", "mha", "intermediate", "ffn"]},
    "no_layers": {"prune.kinds": [*FINE, "hidden"]},
    "no_hidden_no_layers": {"prune.kinds": FINE},
    "no_hidden,no_layers": {"prune.kinds": FINE},
    "no_distillation": {"distill.logits": 0.0, "distill.layers": 0.0},
    "logits_only": {"distill.logits": 1.0, "distill.layers": 0.0},
    "fixed": {"distill.match": "fixed", "distill.num_layers": 12},
    "closest": {"distill.match": "closest"},
    "ordered": {"distill.match": "ordered"},
    "random": {"distill.taught": "random"},
    "roberta": {"model.path": "roberta-base"},
    "random,fixed": {
        "distill.taught": "random",
        "distill.match": "fixed",
        "distill.num_layers": 12,
    },
}


# What the runs of docs/results.md were made with.
SHORT_SST2 = {
    "data.task": "sst2",
    "data.max_length": 64,
    "teacher.train_rows": 16_000,
    "teacher.epochs": 3,
    "teacher.learning_rate": 5e-5,
    "prune.train_rows": 8_000,
    "prune.targets": [0.95],
    "prune.epochs": 8,
    "prune.prepruning_epochs": 1,
    "prune.warmup_epochs": 2,
    "prune.learning_rate": 5e-5,
    "prune.mask_learning_rate": 0.05,
    "prune.multiplier_learning_rate": 0.05,
    "distill.logits": 0.1,
    "distill.layers": 0.9,
    "distill.temperature": 2.0,
    "finetune.train_rows": 8_000,
    "finetune.epochs": 4,
    "finetune.learning_rate": 5e-5,
    "benchmark.batch_size": 32,
    "benchmark.seq_length": 64,
    "eval_every": 250,
    "checkpoint_every": 250,
}


SHORT_COLA = SHORT_SST2 | {
    "data.task": "cola",
    "teacher.train_rows": 0,
    "teacher.epochs": 5,
    "prune.train_rows": 0,
    "prune.targets": [0.60],
    "finetune.train_rows": 0,
}


def get_config(name, *argument):
    return importlib.import_module(f"configs.{name}").get_config(*argument)


@pytest.mark.parametrize("name", NAMES)
def test_file_gives_a_legal_config(name):
    config = get_config(name)
    assert type(config) is Config
    validate(config)
    config.prune.epochs = 3  # nothing is shared between two calls
    config.model.path = "mine"
    assert get_config(name) == get_config(name) != config


@pytest.mark.parametrize("name", NAMES)
def test_docstring_gives_command_score_and_time(name):
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text()))
    assert f"python train.py --config configs/{name}.py" in text
    assert "Expected:" in text
    assert "time" in text.lower()


@pytest.mark.parametrize("task", RECIPES)
def test_recipes_are_the_papers(task):
    flat = flatten(get_config("paper", f"{task},0.6"))
    recipe = RECIPES[task] | {"data.task": task, "prune.targets": [0.6]}
    assert {field: flat[field] for field in recipe} == recipe


@pytest.mark.parametrize("name", ["paper", "short"])
@pytest.mark.parametrize("task", RECIPES)
def test_whole_grid_is_legal(name, task):
    plain = flatten(get_config(name, task))
    assert plain["prune.targets"] == [0.95]
    for sparsity in (0.60, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95):
        for ablation, fields in ABLATIONS.items():
            config = get_config(name, f"{task},{sparsity},{ablation}")
            validate(config)
            tasks.find(config.data)
            fields = fields | {"prune.targets": [sparsity]}
            assert flatten(config) == plain | fields
    assert get_config(name, f"{task},fixed") == get_config(name, f"{task},0.95,fixed")


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_gates_that_are_left_reach_the_highest_target(ablation):
    bert = EncoderConfig(
        vocab_size=30_522,
        hidden_size=768,
        heads=(12,) * 12,
        head_size=64,
        intermediate=(3072,) * 12,
        pooler_size=768,
        num_labels=2,
    )
    config = get_config("paper", f"sst2,0.95,{ablation}")
    assert max_sparsity(bert, config.prune.kinds) >= config.prune.targets[-1]


@pytest.mark.parametrize(
    "argument, fields", [("sst2,0.95", SHORT_SST2), ("cola,0.60", SHORT_COLA)]
)
def test_short_recipes_are_those_of_the_results(argument, fields):
    # The paper's fine-tuning rate and batch sizes are the defaults.
    assert flatten(get_config("short", argument)) == flatten(Config()) | fields


@pytest.mark.parametrize("name", ["paper", "short"])
@pytest.mark.parametrize("task", RECIPES)
def test_gates_have_the_steps_to_close(name, task):
    prune = get_config(name, task).prune
    per_epoch = math.ceil((prune.train_rows or ROWS[task]) / prune.batch_size)
    steps = (prune.epochs - prune.prepruning_epochs) * per_epoch
    # From log-alpha ln 100 to where a gate is as often open as closed.
    distance = math.log(100) + 2 / 3 * math.log(1.1 / 0.1)
    assert prune.mask_learning_rate * steps >= distance
    assert prune.train_rows <= ROWS[task]


@pytest.mark.parametrize(
    "argument, fragments",
    [
        ("", ["task=''", "mnli, qqp, qnli, sst2, cola"]),
        ("foo,0.9", ["task='foo'", "squad"]),
        ("sst2,60", ["sparsity='60'", "[0, 1)"]),
        ("sst2,1.0", ["sparsity='1.0'", "[0, 1)"]),
        ("sst2,nan", ["sparsity='nan'", "[0, 1)"]),
        ("sst2,no_hiden", ["'no_hiden'", "no_hidden, no_layers"]),
        ("sst2,0.9,foo", ["ablation='foo'", "no_hidden, no_layers"]),
        ("sst2,fixed,0.9", ["ablation='0.9'", "no_hidden"]),
    ],
)
@pytest.mark.parametrize("name", ["paper", "short"])
def test_wrong_argument_is_named(name, argument, fragments):
    with pytest.raises(UserError) as caught:
        get_config(name, argument)
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    "argument, targets, epochs",
    [
        ("sst2", [0.6, 0.8, 0.9, 0.95], [0, 2, 3]),
        ("stsb", [0.6, 0.8, 0.9, 0.95], [0, 4, 6]),
        ("rte,0.6", [0.6], [0, 10, 15]),
        ("rte,0.8", [0.6, 0.8], [0, 10, 15]),  # never to a high target at one go
        ("own,0.5,0.75,budget=3", [0.5, 0.6, 0.75], [0, 3, 5]),
    ],
)
def test_fast_splits_its_budget(argument, targets, epochs):
    config = get_config("fast", argument)
    validate(config)
    flat = flatten(config)
    assert flat["data.task"] == argument.partition(",")[0]
    assert flat["prune.targets"] == targets
    fields = ("prune.epochs", "prune.recover_epochs", "finetune.epochs")
    assert [flat[field] for field in fields] == epochs


@pytest.mark.parametrize(
    "argument, words",
    [
        ("sst3", ["task='sst3'", "stsb"]),
        ("sst2,half", ["target='half'", "budget=4"]),
        ("sst2,budget=2.5", ["budget='2.5'", "whole number of epochs"]),
        ("sst2,0.6,budget=0", ["budget='0'", "above 0"]),
        ("sst2,0.6,8x", ["targets='0.6,8x'", "all speedups"]),
        ("sst2,eightx", ["target='eightx'"]),
    ],
)
def test_fast_refuses(argument, words):
    with pytest.raises(UserError) as error:
        get_config("fast", argument)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "argument, speedups",
    [
        ("sst2,4x", [2, 4]),
        ("stsb,3x,12x", [2, 3, 4, 8, 12]),
        ("sst2,2.01x", [2.01]),  # 2x would be no other target.
        ("sst2,3.97x,4.1x", [2, 3.97, 4.1]),
    ],
)
def test_fast_takes_speedups(argument, speedups):
    config = get_config("fast", argument)
    validate(config)
    flat = flatten(config)
    assert flat["prune.target_speedup"] == speedups and flat["prune.targets"] == []
    assert get_config("fast", "sst2").prune.target_speedup == ()


def test_sst2_95_is_a_point_of_the_grid():
    assert get_config("sst2_95") == get_config("paper", "sst2,0.95")


@pytest.mark.parametrize("name", NAMES)
def test_json_holds_every_field(name):
    config = get_config(name)
    text = to_json(config)
    # JSON knows lists only.
    expected = json.loads(json.dumps(dataclasses.asdict(config)))
    assert json.loads(text) == expected
    assert flatten(text) == flatten(config)
    assert text.endswith("}\n")


def test_flatten_names_leaves_by_their_path():
    flat = flatten(Config())
    assert flat["seed"] == 57
    assert flat["prune.kinds"] == list(KINDS)
    leaves = [
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(Config)
        if dataclasses.is_dataclass(section.type)
        for field in dataclasses.fields(section.type)
        if not dataclasses.is_dataclass(field.type)
    ]
    assert {*leaves, "prune.structure.layers"} < set(flat)
    assert not any(isinstance(value, dict) for value in flat.values())


def set_field(config, field, value):
    *sections, name = field.split(".")
    for section in sections:
        config = getattr(config, section)
    setattr(config, name, value)


# What no command line can say, but a config file can.
WRONG = {
    "seed": True,
    "model": None,
    "model.path": pathlib.Path("x"),
    "prune.epochs": 3.0,
    "prune.learning_rate": "2e-5",
    "prune.kinds": "head",
    "prune.target_sparsty": 0.9,  # misspelt
    "sed": 3,
    "data.buckets": (16, 8),
    "eval_every": 2**31,
}


@pytest.mark.parametrize("field", WRONG)
def test_wrong_assignment_is_named(field):
    config = Config()
    set_field(config, field, WRONG[field])
    with pytest.raises(UserError) as caught:
        validate(config)
    message = str(caught.value)
    assert message.startswith(f"{field}={WRONG[field]!r}: ")
    assert "\n" not in message


# Values on the command line


@pytest.mark.parametrize(
    "text, expected",
    [
        ("0,1,2", ("0", "1", "2")),
        ("(0,1,2)", ("0", "1", "2")),
        ("[0, 1]", ("0", "1")),
        ("007,1.0", ("007", "1.0")),
        ("-1,1", ("-1", "1")),
        ("1e3,0x10", ("1e3", "0x10")),
        ("True,None", ("True", "None")),
        ("2001", ("2001",)),
        ("my text", ("my text",)),
        ("my text,its title", ("my text", "its title")),
        (" first", (" first",)),
        ("('a b',)", ("a b",)),
        ("'a b','c,d'", ("a b", "c,d")),
        ('["a"]', ("a",)),
        ("it's,b", ("it's", "b")),
        ("'a", ("'a",)),
        ("(text)", ("(text)",)),
        ("[a],b", ("[a]", "b")),
        ("(" * 999, ("(" * 999,)),
        ("()", ()),
        ("a\0b", ("a\0b",)),
    ],
)
@pytest.mark.parametrize("field", ["labels", "columns", "metrics"])
def test_texts_on_the_command_line_stay_texts(field, text, expected):
    for flags in ([f"--config.data.{field}={text}"], [f"--config.data.{field}", text]):
        assert dict(cli.overrides(flags, "")) == {f"data.{field}": expected}
        config = cli.parse(["train.py", "--config=configs/demo.py", *flags])[0]
        assert getattr(config.data, field) == expected


@pytest.mark.parametrize(
    "field, text, expected",
    [
        ("prune.targets", "0.5,0.9", (0.5, 0.9)),
        ("prune.targets", "0.5", (0.5,)),
        ("data.buckets", "8,16", (8, 16)),
        ("data.buckets", "()", ()),
        ("data.buckets", "{[8]}", ("{[8]}",)),  # It is refused, as no numbers are.
        ("prune.kinds", "head,ffn", ("head", "ffn")),
        ("data.label_column", "its class", "its class"),
        ("data.label_column", "0", "0"),
        ("data.quoting", "false", False),
        ("seed", "3", 3),
    ],
)
def test_other_values_on_the_command_line(field, text, expected):
    assert dict(cli.overrides([f"--config.{field}={text}"], "")) == {field: expected}
