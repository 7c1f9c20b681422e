"""Records how seqeval 1.2.2 scores random labels, for tests that run without it.

    pip install seqeval==1.2.2
    python tests/record_seqeval.py

writes fixtures/seqeval.json: 1,000 pairs of a right and a predicted sequence, whose
letters are the numbers of classes (a: 0, b: 1, ...), each with its precision, recall
and F1; and of all pairs of a scheme the same for each type, with the type's count.
"""

import json
import random
import string
import warnings
from pathlib import Path

FIXTURE = Path(__file__).parent / "fixtures" / "seqeval.json"
TYPES = ("LOC", "PER", "a-b")
SCHEMES = {"BI": 400, "I": 200, "BIES": 400}


def draw(rng, names):
    """A sequence, half of which is O, and one that mostly agrees with it."""
    length = rng.randint(1, 12)
    gold = [rng.choice(("O", rng.choice(names))) for _ in range(length)]
    given = [rng.choice(names) if rng.random() < 0.3 else tag for tag in gold]
    return gold, given


def main():
    """Writes the fixture."""
    from seqeval.metrics import sequence_labeling

    score = sequence_labeling.precision_recall_fscore_support

    warnings.simplefilter("ignore")
    rng, found = random.Random(0), {}
    for letters, count in SCHEMES.items():
        names = ["O", *(f"{x}-{kind}" for kind in TYPES for x in letters)]
        letter = dict(zip(names, string.ascii_letters, strict=False))
        pairs = [draw(rng, names) for _ in range(count)]
        scores = [score([g], [p], average="micro")[:3] for g, p in pairs]
        texts = [["".join(map(letter.get, tags)) for tags in pair] for pair in pairs]
        rows = zip(texts, scores, strict=True)
        both = [*map(list, zip(*pairs, strict=True))]
        by_type = zip(*score(*both), strict=True)
        found[letters] = {
            "names": names,
            "pairs": [[*text, *(round(float(x), 6) for x in s)] for text, s in rows],
            "types": {
                kind: [round(float(x), 6) for x in row]
                for kind, row in zip(TYPES, by_type, strict=True)
            },
            "all": [*map(float, score(*both, average="micro")[:3])],
        }
    FIXTURE.write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
