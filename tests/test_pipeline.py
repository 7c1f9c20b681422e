"""A saved model as a function: batches as small as the texts, and what they cost."""

import numpy as np
import pytest
from conftest import random_params

import cofi_jax as cofi
from cofi_jax import UserError
from cofi_jax.checkpoints import saved_model
from cofi_jax.data import toy
from cofi_jax.evaluation import predict as predict_lib
from cofi_jax.models.config import EncoderConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

TEXTS = [sentence for sentence, _ in toy.generate(75, 0)]
LENGTHS = (8, 16, 24)  # the padded lengths


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    tokenizer = toy.demo_tokenizer()
    config = EncoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        heads=(2, 2),
        head_size=8,
        intermediate=(6, 6),
        pooler_size=16,
        num_labels=2,
        max_positions=24,
    )
    data = {"task": "demo", "max_length": 24, "buckets": list(LENGTHS)}
    about = {"task": "demo", "labels": ["blame", "praise"], "data": data}
    path = tmp_path_factory.mktemp("pipeline") / "model"
    params = random_params(config, 0)
    saved_model.save_model(path, params, config, tokenizer=tokenizer, about=about)
    return path


@pytest.fixture
def shapes(monkeypatch):
    """The shapes of all batches that a model sees, in their order."""
    seen, make = [], predict_lib.make_predict

    def recording(model):
        def call(params, masks, batch):
            seen.append(batch["input_ids"].shape)
            return make(model)(params, masks, batch)

        return call

    monkeypatch.setattr(predict_lib, "make_predict", recording)
    return seen


@pytest.mark.parametrize(
    ("count", "batch_size", "expected"),
    [
        (1, 32, [1]),
        (2, 32, [2]),
        (3, 32, [4]),
        (17, 32, [32]),
        (33, 32, [32, 1]),
        (75, 32, [32, 32, 16]),
        (5, 6, [6]),
        (9, 6, [6, 4]),
        (4, 1, [1] * 4),
    ],
)
def test_a_short_batch_is_filled_up_to_a_power_of_two(
    saved, shapes, count, batch_size, expected
):
    cofi.pipeline(saved, batch_size=batch_size)(TEXTS[:count])
    assert [rows for rows, _ in shapes] == expected


def test_answers_do_not_depend_on_the_other_texts(saved):
    classify = cofi.pipeline(saved)
    together = classify(TEXTS)
    for text, answer in zip(TEXTS[:20], together, strict=False):
        (alone,) = classify([text])
        assert alone["label"] == answer["label"]
        np.testing.assert_allclose(alone["score"], answer["score"], rtol=1e-5)


def test_programs_are_few(saved):
    """However many texts come: one for each padded length and power of two."""
    predict = predict_lib.make_predict(cofi.load_model(saved)[0])
    before = predict._cache_size()
    classify = cofi.pipeline(saved, batch_size=8)
    for count in range(1, 26):
        classify(TEXTS[count:])
        classify(TEXTS[:count])
    assert predict._cache_size() - before <= 4 * len(LENGTHS)


def test_the_first_texts_are_looked_at_and_no_others(saved, capsys):
    classify = cofi.pipeline(saved)
    unknown = ["\u4e16\u754c \u4e16\u754c"]
    classify([])
    classify(unknown)
    said = capsys.readouterr().err.splitlines()
    assert said and all("known to its tokenizer" in line for line in said)
    classify(unknown)
    classify(TEXTS[:3] + unknown)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("texts", [[], (), iter([]), np.array([], str)])
def test_no_texts_have_no_answers(saved, shapes, texts):
    assert cofi.pipeline(saved)(texts) == [] and shapes == []


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ("a text", "must be a list of texts"),
        (b"a text", "must be a list of texts"),
        ({"a": 1}, "must be a list of texts"),
        (None, "must be a list of texts"),
        (3, "must be a list of texts"),
        ([b"a"], "must be a list of texts"),
        ([["a", "b"]], "must be a list of texts"),
        ([[]], "must be a list of texts"),
        (["a", "\ud800"], "half of a surrogate pair"),
        (["a", "b \udcff c"], "half of a surrogate pair"),
    ],
)
def test_what_is_no_text_is_said_in_one_line(saved, texts, said):
    with pytest.raises(UserError) as caught:
        cofi.pipeline(saved)(texts)
    message = str(caught.value)
    assert message.startswith("texts=") and said in message and message.isprintable()


@pytest.mark.parametrize("size", [0, -1, 2.5, "8"])
def test_what_is_no_size_of_a_batch(saved, size):
    with pytest.raises(UserError, match=f"^batch_size={size!r}: must be a whole numb"):
        cofi.pipeline(saved, batch_size=size)
