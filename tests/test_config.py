"""The config files that come with the project, and a config's way through JSON."""

import ast
import dataclasses
import importlib
import json
import pathlib

import pytest

from cofi_jax.config import KINDS, Config, UserError, flatten, to_json, validate

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")

# Appendix A of the paper.
SST2 = {
    "seed": 57,
    "prune.kinds": list(KINDS),
    "prune.target_sparsity": 0.95,
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
    "finetune.epochs": 20,
    "data.task": "sst2",
    "data.max_length": 128,
}
COLA = {
    "data.task": "cola",
    "prune.epochs": 100,
    "prune.prepruning_epochs": 4,
    "prune.warmup_epochs": 20,
}


def get_config(name):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize("name", NAMES)
def test_file_gives_a_legal_config(name):
    config = get_config(name)
    assert type(config) is Config
    validate(config)
    assert config is not get_config(name)  # nothing is shared between two calls


@pytest.mark.parametrize("name", NAMES)
def test_docstring_gives_command_score_and_time(name):
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text()))
    assert f"python train.py --config configs/{name}.py" in text
    assert "Expected:" in text
    assert "time" in text.lower()


@pytest.mark.parametrize("name, values", [("sst2_95", SST2), ("cola_95", SST2 | COLA)])
def test_hyperparameters_are_the_papers(name, values):
    flat = flatten(get_config(name))
    assert {field: flat[field] for field in values} == values


def test_sst2_60_differs_in_its_target_alone():
    low, high = flatten(get_config("sst2_60")), flatten(get_config("sst2_95"))
    differing = {field: low[field] for field in high if low[field] != high[field]}
    assert differing == {"prune.target_sparsity": 0.6}


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
    ]
    assert set(leaves) < set(flat)
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
