"""The embedded demo task: to tell whether a generated film remark praises or blames.

    although the dull plot was clever , the bright ending was never really weak
    `----- yields to the other clause'                        flips      blame -> praise

A clause takes the sign of its last adjective, turned by "not" or "never"; an
adjective before its noun says nothing. Of two clauses, the one that decides stands
after "but", or is the one that "although" does not introduce. So word order makes the
label: counting words finds the easy third of the sentences and little else.
"""

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import transformers

PRAISE = (
    "bright brilliant charming clever fine fresh funny good graceful great honest "
    "lovely moving sharp tender warm"
).split()
BLAME = (
    "awful bad bland clumsy cold cruel dreary dull empty hollow lazy messy poor "
    "shallow stale weak"
).split()
NOUNS = (
    "acting camera cast climax comedy dialogue drama ending film hero music opening "
    "pacing plot scene score script story style villain"
).split()
VERBS = "is was seemed felt".split()
NEGATIONS = "not never".split()
ADVERBS = "very really quite rather truly so".split()
OTHER = "the but although ,".split()
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")  # ids 0 to 3
SIZES = {"train": 16_000, "validation": 1_000}


def generate(rows: int, seed: int) -> list[tuple[str, int]]:
    """Draws different sentences: pairs with labels 0 and 1 in turn; 1 is praise.

    The same seed draws the same sentences.
    """
    rng = random.Random(seed)
    drawn = {}
    while len(drawn) < rows:
        label = len(drawn) % 2
        drawn.setdefault(_sentence(rng, label), label)
    return list(drawn.items())


def _sentence(rng: random.Random, label: int) -> str:
    if rng.random() < 0.35:  # An easy one gives an untrained model a foothold.
        return _clause(rng, label, negated=False)
    decides = _clause(rng, label, negated=rng.random() < 0.35)
    if rng.random() < 0.25:
        return decides
    yields = _clause(rng, 1 - label, negated=rng.random() < 0.35)
    contrast = rng.choice(("{a} but {b}", "although {a} , {b}", "{b} although {a}"))
    return contrast.format(a=yields, b=decides)


def _clause(rng: random.Random, sign: int, *, negated: bool) -> str:
    words = ["the"]
    if rng.random() < 0.2:
        words.append(rng.choice(PRAISE + BLAME))
    words += [rng.choice(NOUNS), rng.choice(VERBS)]
    if negated:
        words.append(rng.choice(NEGATIONS))
    if rng.random() < 0.5:
        words.append(rng.choice(ADVERBS))
    words.append(rng.choice(PRAISE if bool(sign) != negated else BLAME))
    return " ".join(words)


def demo_rows(split: str) -> dict[str, list]:
    """The columns of the split "train" or "validation", which share no sentence."""
    drawn = generate(sum(SIZES.values()), seed=0)
    start = 0 if split == "train" else SIZES["train"]
    sentences, labels = zip(*drawn[start : start + SIZES[split]], strict=True)
    return {"sentence": list(sentences), "label": list(labels)}


def demo_tokenizer() -> "transformers.BertTokenizer":
    """A tokenizer in the style of BERT that knows whole words only."""
    import transformers

    groups = (SPECIAL, OTHER, NEGATIONS, VERBS, ADVERBS, NOUNS, PRAISE, BLAME)
    ids = {word: i for i, word in enumerate(sum(map(list, groups), []))}
    return transformers.BertTokenizer(vocab=ids, mask_token=None)
