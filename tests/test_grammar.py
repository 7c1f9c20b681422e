import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from cofi_jax.data import toy


def label_of(sentence):
    """Reads the label off a sentence, by the rules in the docstring of `toy`."""
    words = sentence.split()
    if "but" in words:
        words = words[words.index("but") + 1 :]
    elif words[0] == "although":
        words = words[words.index(",") + 1 :]
    elif "although" in words:
        words = words[: words.index("although")]
    flips = sum(word in ("not", "never") for word in words)
    return int(words[-1] in toy.PRAISE) ^ (flips % 2)


@pytest.fixture(scope="module")
def splits():
    return {split: toy.demo_rows(split) for split in ("train", "validation")}


@pytest.fixture(scope="module")
def tokenizer():
    return toy.demo_tokenizer()


@pytest.mark.parametrize(
    "sentence, label",
    [
        ("the film was good", 1),
        ("the film was not good", 0),
        ("the film was never so dull", 1),
        ("the dull film was good", 1),
        ("the film was good but the ending was dull", 0),
        ("the ending was dull but the film was good", 1),
        ("the film was good but the ending was not dull", 1),
        ("the film was not good but the ending was dull", 0),
        ("although the film was good , the ending was dull", 0),
        ("although the film was not dull , the ending was not good", 0),
        ("the film was good although the ending was dull", 1),
        ("the film was not good although the ending was never dull", 0),
    ],
)
def test_label_by_hand(sentence, label):
    assert label_of(sentence) == label


def test_parser_agrees_with_generator():
    assert all(label_of(s) == label for s, label in toy.generate(5000, 3))


def test_same_seed_same_sentences():
    first = toy.generate(300, 1)
    assert first == toy.generate(300, 1)
    assert first[:100] == toy.generate(100, 1)
    assert first != toy.generate(300, 2)


def test_splits_are_balanced_disjoint_and_without_repeats(splits):
    for split, columns in splits.items():
        assert len(columns["sentence"]) == toy.SIZES[split]
        assert np.mean(columns["label"]) == 0.5
    everything = splits["train"]["sentence"] + splits["validation"]["sentence"]
    assert len(set(everything)) == len(everything)


def test_sentences_and_vocabulary_are_small(splits):
    sentences = splits["train"]["sentence"]
    assert max(len(s.split()) for s in sentences) <= 22
    assert 60 <= len({word for s in sentences for word in s.split()}) <= 120


def test_counting_words_is_not_enough(splits):
    train, validation = splits["train"], splits["validation"]
    count = CountVectorizer(token_pattern=r"\S+")
    model = LogisticRegression(max_iter=1000)
    model.fit(count.fit_transform(train["sentence"][:8000]), train["label"][:8000])
    score = model.score(count.transform(validation["sentence"]), validation["label"])
    assert 0.6 < score < 0.72


def test_tokenizer_knows_every_word(splits, tokenizer):
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]"]) == [
        *range(4)
    ]
    for columns in splits.values():
        for ids in tokenizer(columns["sentence"])["input_ids"]:
            assert tokenizer.unk_token_id not in ids


def test_tokenizer_template(tokenizer):
    the, film, was, good = tokenizer.convert_tokens_to_ids("the film was good".split())
    single = tokenizer("The film was good")
    assert single["input_ids"] == [2, the, film, was, good, 3]
    pair = tokenizer("the film", "unheard good")
    assert pair["input_ids"] == [2, the, film, 3, 1, good, 3]
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]


def test_tokenizer_survives_saving(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    pair = ("The film , however", "was not good")
    assert loaded(*pair).data == tokenizer(*pair).data
    assert loaded.pad_token_id == 0
    assert loaded.model_input_names == tokenizer.model_input_names
