"""Vectors of texts: pooling, the loss, scores, rows, folders, and a run of it all."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
import scipy.stats
import sklearn.metrics
from conftest import WITHOUT_US, printed_without, random_params
from pyarrow import parquet

import cofi_jax as cofi
from cofi_jax import config as config_lib
from cofi_jax.checkpoints import huggingface, sentence_transformers, tokenizers
from cofi_jax.checkpoints.hf_names import to_hugging_face
from cofi_jax.config import Config, Data
from cofi_jax.data import batches, sources, tasks
from cofi_jax.data.problems import PROBLEMS
from cofi_jax.data.problems.vectors import Pairs, Retrieval
from cofi_jax.errors import UserError
from cofi_jax.evaluation import evaluate
from cofi_jax.export import export, to_onnx, to_stock_bert, to_transformers
from cofi_jax.models.config import EncoderConfig
from cofi_jax.pruning import slicing
from cofi_jax.report import model_card, tables
from cofi_jax.run import run as run_lib
from cofi_jax.run import setup
from cofi_jax.training.importance import importance
from configs import vectors as recipe

pytestmark = pytest.mark.usefixtures("quick_compile", "without_pictures")

VECTORS = PROBLEMS["vectors"]
WORDS = [f"w{i}" for i in range(25)]
SIZES = EncoderConfig(
    vocab_size=30,
    hidden_size=16,
    heads=(2, 2),
    head_size=8,
    intermediate=(12, 12),
    pooler_size=0,
    num_labels=16,
    max_positions=14,
    dropout=0.0,
    problem="vectors",
    head="mean",
    normalize=True,
)
DENSE = dataclasses.replace(
    SIZES, num_labels=5, output_activation="tanh", head="max", normalize=False
)
KINDS = [
    SIZES,
    DENSE,
    dataclasses.replace(DENSE, head="cls", output_bias=False, normalize=True),
    dataclasses.replace(DENSE, head="mean", output_activation="relu"),
]


def own(path="", **more):
    fields = {"columns": ("text",), "problem": "vectors", "max_length": 12} | more
    return Data(task="own", path=str(path), **fields)


def batch_of(rows=3, length=6):
    """Rows of 6, 4 and 1 tokens."""
    ids = np.random.default_rng(0).integers(5, 30, (rows, length)).astype(np.int32)
    real = np.arange(length) < np.array([length, 4, 1])[:rows, None]
    mask = real.astype(np.int32)
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": 0 * ids}


def apply(config, params, batch, masks=None):
    variables = {"params": params, "masks": masks or {}}
    return cofi.Encoder(config).apply(variables, batch)


def texts(count, seed=0):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 15, count)
    return [" ".join(rng.choice(WORDS, size)) for size in sizes]


# The model


@pytest.mark.parametrize("config", KINDS)
def test_a_vector_is_that_of_numpy(config):
    params, batch = random_params(config, seed=1), batch_of()
    output = apply(config, params, batch)
    states = np.asarray(output.hidden_states[-1])
    for row, size in enumerate([6, 4, 1]):  # of real tokens alone
        x = states[row, :size]
        x = {"mean": x.mean(0), "max": x.max(0), "cls": x[0]}[config.head]
        if config.output_activation:
            linear = params["classifier"]
            assert ("bias" in linear) == config.output_bias
            x = x @ linear["kernel"] + linear.get("bias", 0)
            x = np.tanh(x) if config.output_activation == "tanh" else np.maximum(x, 0)
        if config.normalize:
            x = x / np.linalg.norm(x)
        np.testing.assert_allclose(output.logits[row], x, atol=1e-5)


def test_the_width_is_kept_where_hidden_dimensions_are_cut():
    params, batch = random_params(SIZES, seed=2), batch_of()
    wide, config = slicing.keep_width(params, SIZES)
    expected = apply(SIZES, params, batch).logits
    np.testing.assert_allclose(apply(config, wide, batch).logits, expected, atol=1e-6)
    assert slicing.keep_width(*slicing.keep_width(params, SIZES))[1] == config
    hidden = np.linspace(0.4, 1.0, 16, dtype=np.float32) * (np.arange(16) % 3 > 0)
    masks = {"hidden": jnp.asarray(hidden)}
    small, spec = cofi.prune(wide, masks, config)
    sizes = spec.config(config)
    assert sizes.hidden_size == 10 and sizes.num_labels == 16
    kept = np.eye(16)[list(spec.hidden)]
    np.testing.assert_array_equal(small["classifier"]["kernel"], kept)
    masked = apply(config, wide, batch, masks).logits
    np.testing.assert_allclose(apply(sizes, small, batch).logits, masked, atol=1e-5)


# The loss


def random_vectors(seed=0, count=5):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, count, 4)).astype(np.float32) * 3


def test_the_loss_by_hand():
    student, teacher = random_vectors()
    weight = np.array([1, 1, 1, 1, 0], np.float32)  # The last row fills a batch up.

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    losses = []
    for i in range(4):
        s, t = student[i], teacher[i]
        gaps = [
            (cosine(s, student[j]) - cosine(t, teacher[j])) ** 2
            for j in range(4)
            if j != i
        ]
        error = np.sum((s - t) ** 2) / np.sum(t**2)
        losses.append(1 - cosine(s, t) + error + 10 * np.mean(gaps))
    loss = VECTORS.distill(student, teacher, {"weight": weight}, 2.0)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)


def test_the_loss_is_0_at_the_teacher_and_finite_at_0():
    student, teacher = random_vectors()
    batch = {"weight": np.ones(5, np.float32)}
    assert abs(VECTORS.distill(teacher, teacher, batch, 2.0)) < 1e-5
    slope = jax.grad(VECTORS.distill)(0 * student, teacher, batch, 2.0)
    assert np.isfinite(slope).all() and np.abs(slope).max() > 0


def test_importance_needs_no_labels():
    """A feed-forward unit that nothing reads is worth nothing, and another one is."""
    params, batch = random_params(SIZES, seed=3), batch_of()
    params["layer_1"]["ffn"]["down"]["kernel"][4] = 0
    batch |= {"weight": np.ones(3, np.float32)}  # There are no labels at all.
    model = cofi.Encoder(SIZES)
    kinds = ("intermediate",)
    found = importance(model, params, [batch], kinds=kinds, labels=False)
    assert found["intermediate"][1, 4] == 0
    assert np.delete(found["intermediate"][1], 4).min() > 0


# Scores


def examples_of(labels, uncut=None):
    rows = [np.zeros(1, np.int32)] * len(labels)
    return batches.Examples(rows, rows, labels, uncut=uncut)


def scores(logits, examples):
    count, score = VECTORS.scorer(logits, examples, ("agreement", "cosine"))
    return score(np.arange(count))


def test_agreement_by_brute_force():
    ours, theirs = np.random.default_rng(0).standard_normal((2, 30, 8))
    ours += theirs
    found = scores(ours, examples_of(theirs))
    similar = [sklearn.metrics.pairwise.cosine_similarity(x) for x in (ours, theirs)]
    shares = []
    for row in range(30):
        order = [[*np.argsort(-x[row])] for x in similar]
        near = [set([i for i in each if i != row][:10]) for each in order]
        shares.append(len(near[0] & near[1]) / 10)
    assert 0.3 < np.mean(shares) < 1
    assert found["agreement"] == pytest.approx(np.mean(shares))
    own = [sklearn.metrics.pairwise.paired_cosine_distances(ours, theirs)]
    assert found["cosine"] == pytest.approx(1 - np.mean(own))
    values = VECTORS.per_example(ours, examples_of(theirs), ())
    np.testing.assert_allclose(values["agreement"], shares)


@pytest.mark.parametrize("count", [3, 4, 11, 21])
def test_few_texts_do_not_agree_by_themselves(count):
    """Vectors that texts have exchanged agree less than the same ones."""
    angles = np.linspace(0, np.pi, count)
    theirs = np.stack([np.cos(angles), np.sin(angles)], -1)
    swap = np.arange(count) * (count // 2 + 1) % count
    same = VECTORS.per_example(theirs, examples_of(theirs), ())["agreement"]
    assert same.mean() == 1
    other = VECTORS.per_example(theirs[swap], examples_of(theirs), ())["agreement"]
    assert other.mean() < 1


def test_rows_without_similarities_are_scored_by_answers():
    vectors = np.eye(3)
    examples = examples_of(VECTORS.answers(vectors, examples_of(np.zeros(3))))
    assert scores(vectors, examples) == {"agreement": 1, "cosine": 1}
    with pytest.raises(UserError, match="^width of vectors=2: must be 3"):
        scores(vectors[:, :2], examples)


def test_pairs_are_scored_by_the_cosines_of_their_texts():
    rng = np.random.default_rng(1)
    logits, gold = rng.standard_normal((20, 4)), rng.random(10).astype(np.float32)
    pairs = Pairs([""] * 20, np.arange(20, dtype=np.int32), gold)
    cosines = [
        np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
        for a, b in zip(logits[::2], logits[1::2], strict=True)
    ]
    expected = {
        "spearman": scipy.stats.spearmanr(cosines, gold).statistic,
        "pearson": scipy.stats.pearsonr(cosines, gold).statistic,
    }
    examples = examples_of(np.zeros(20, np.int32), pairs)
    assert scores(logits, examples) == pytest.approx(expected)


def test_retrieval_is_scored_as_by_scikit_learn():
    rng = np.random.default_rng(2)
    queries, documents = 4, 40
    logits = rng.standard_normal((queries + documents, 6))
    gains = rng.integers(0, 3, (queries, documents)) * (rng.random((4, 40)) < 0.2)
    gains[:, 0] = 1
    relevant = [{int(d): float(row[d]) for d in np.flatnonzero(row)} for row in gains]
    count = queries + documents
    uncut = Retrieval([""] * count, np.arange(count, dtype=np.int32), relevant)
    found = uncut.values(logits)
    similar = sklearn.metrics.pairwise.cosine_similarity(logits[:4], logits[4:])
    for q in range(queries):
        ndcg = sklearn.metrics.ndcg_score(gains[q : q + 1], similar[q : q + 1], k=10)
        assert found["ndcg_at_10"][q] == pytest.approx(ndcg)
        first = np.argsort(-similar[q])[:10]
        recall = (gains[q][first] > 0).sum() / (gains[q] > 0).sum()
        assert found["recall_at_10"][q] == pytest.approx(recall)
    mean = {name: np.mean(values) for name, values in found.items()}
    assert scores(logits, examples_of(np.zeros(count), uncut)) == pytest.approx(mean)


def test_a_query_does_not_find_itself(tmp_path):
    """A text of the corpus with its `_id`, as in BEIR; but one that is relevant."""
    same = {
        "corpus.jsonl": [{"_id": name, "text": "w1"} for name in ("q1", "d1", "q2")],
        "qrels": "query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\tq2\t1\n",
    }
    path = write_retrieval(tmp_path / "set", **same)
    _, found = sources.load(tasks.find(own(retrieval=path)), ("retrieval",))
    vectors = np.array([[1, 0], [0, 1], [1, 0], [0.9, 0.1], [0, 1]])
    values = found["retrieval"]["uncut"].values(vectors)
    np.testing.assert_array_equal(values["ndcg_at_10"], [1, 1])


# Rows


def test_some_texts_are_held_out(tmp_path):
    rows = texts(60)
    (tmp_path / "a.txt").write_text("\n".join([*rows, "", rows[0]]))
    task, found = sources.load(tasks.find(own(tmp_path)), ("train", "validation"))
    assert task.metrics == ("agreement", "cosine") and not task.label_columns
    train, held_out = (found[split]["text"] for split in ("train", "validation"))
    unique = list(dict.fromkeys(rows))
    assert held_out == unique[::10] and train == [
        x for x in unique if x not in held_out
    ]
    _, again = sources.load(tasks.find(own(tmp_path / "a.txt")), ("train",))
    assert again["train"]["text"] == train
    table = pyarrow.table({"text": ["a", "b", " ", "c"], "label": [None] * 4})
    for split in ("train", "validation"):
        parquet.write_table(table, tmp_path / f"{split}.parquet")
    _, found = sources.load(task, ("train", "validation"))
    assert found["train"]["text"] == found["validation"]["text"] == list("abc")
    (tmp_path / "validation.parquet").unlink()
    with pytest.raises(UserError, match="must hold 21 texts or more"):
        sources.load(task, ("validation",))
    for path in ("", str(tmp_path / "none")):
        with pytest.raises(UserError, match="^data.path=.*must be a file or a folder"):
            sources.load(tasks.find(own(path)), ("train",))


@pytest.mark.parametrize("name", ["{}.txt", "{}.csv", "data/{}-00000-of-00001.csv"])
def test_splits_are_known_by_the_names_of_files(name, tmp_path):
    """In the places and formats of rows with labels, and as lines of text."""
    (tmp_path / "data").mkdir()
    wanted = {"train": ["w1", "w2"], "validation": ["w3", "w4", "w6"]}
    for split, some in {**wanted, "test": ["w5"]}.items():
        head = [] if name.endswith("txt") else ["text"]
        (tmp_path / name.format(split)).write_text("\n".join(head + some) + "\n")
    _, found = sources.load(tasks.find(own(tmp_path)), ("train", "validation"))
    assert {split: columns["text"] for split, columns in found.items()} == wanted


@pytest.mark.parametrize(
    ("split", "lines", "least"), [("train", " \n\n", 1), ("validation", "w1\nw2\n", 3)]
)
def test_splits_of_too_few_texts(split, lines, least, tmp_path):
    for name in ("train", "validation"):
        (tmp_path / f"{name}.txt").write_text("w1\nw2\n")
    (tmp_path / f"{split}.txt").write_text(lines)
    said = f"{split}.txt must hold {least} or more texts that are not blank"
    with pytest.raises(UserError, match=f"^data.path=.*: {said}"):
        sources.load(tasks.find(own(tmp_path)), (split,))


def write_retrieval(folder, **changes):
    """A set in the layout of BEIR, as jsonl and tsv."""
    files = {
        "corpus.jsonl": [
            {"_id": "d1", "title": "T", "text": "w1 w2"},
            {"_id": "d2", "title": "", "text": "w3"},
        ],
        "queries.jsonl": [{"_id": "q1", "text": "w4"}, {"_id": "q2", "text": "w5"}],
        "qrels": "query-id\tcorpus-id\tscore\nq2\td2\t1\nq1\td1\t0\nq2\td1\t2\n",
    } | changes
    (folder / "qrels").mkdir(parents=True)
    (folder / "qrels" / "test.tsv").write_text(files.pop("qrels"))
    for name, rows in files.items():
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def test_pairs_and_a_retrieval_set(tmp_path, capsys):
    path = tmp_path / "validation.csv"
    path.write_text("label,sentence1,sentence2\n0.5,w1,w2\n4,w3 w4,w5\n")
    retrieval = write_retrieval(tmp_path / "set")
    for pairs in (path, tmp_path):
        task = tasks.find(own(tmp_path, pairs=str(pairs), retrieval=retrieval))
        assert task.metrics == ("spearman", "pearson")
        _, found = sources.load(task, task.validation)
        assert found["validation"]["text"] == ["w1", "w2", "w3 w4", "w5"]
        similarities = found["validation"]["uncut"].similarities
        np.testing.assert_array_equal(similarities, np.float32([0.5, 4]))
    assert found["retrieval"]["text"] == ["w5", "T w1 w2", "w3"]
    assert found["retrieval"]["uncut"].relevant == [{1: 1.0, 0: 2.0}]
    assert (
        "1 queries have no relevant text; they are left out" in capsys.readouterr().err
    )


def test_quotes_of_pairs_and_of_a_retrieval_set(tmp_path):
    """As in the files of texts: by `data.quoting` they are letters, as in STS-B's."""
    path = tmp_path / "pairs.tsv"
    path.write_text('label\tsentence1\tsentence2\n1\t"w1" w2\t"w3\n')
    retrieval = write_retrieval(tmp_path / "set", **{"queries.jsonl": []})
    (tmp_path / "set" / "queries.jsonl").unlink()
    (tmp_path / "set" / "queries.tsv").write_text('_id\ttext\nq1\tw1\nq2\t"w2" w3\n')
    sets = {"pairs": str(path), "retrieval": retrieval}
    task = tasks.find(own(tmp_path, quoting=False, **sets))
    _, found = sources.load(task, task.validation)
    assert found["validation"]["text"] == ['"w1" w2', '"w3']
    assert found["retrieval"]["text"][0] == '"w2" w3'
    task = tasks.find(own(tmp_path, **sets))
    for split, field in zip(task.validation, sets, strict=True):
        with pytest.raises(UserError, match=f"^data.{field}=.*data.quoting=false"):
            sources.load(task, (split,))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("sentence1,label\na,1\n", "needs a column 'sentence2'; it has sentence1"),
        (
            "sentence1,sentence2,label\na,b,1\na,c,x\n",
            "row 1 .*label='x', must be a fin",
        ),
        ("sentence1,sentence2,label\na,,1\n", "row 0 .*sentence2='None', must be text"),
        ("sentence1,sentence2,label\na,b,nan\n", "label='nan', must be a finite"),
        ("sentence1,sentence2,label\na,b,1e39\n", "label='1e39', must be a finite"),
        ("sentence1,sentence2,label\na,b,1_0\n", "label='1_0', must be a finite"),
        ("sentence1,sentence2,label,label\na,b,1,2\n", "has several columns 'label'"),
        ("sentence1,sentence2,label\n", "has no rows"),
    ],
)
def test_pairs_that_are_none(tmp_path, content, said):
    (tmp_path / "x.csv").write_text(content)
    task = tasks.find(own(tmp_path, pairs=str(tmp_path / "x.csv")))
    with pytest.raises(UserError, match=f"^data.pairs=.*{said}") as caught:
        sources.load(task, ("validation",))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"qrels": "query-id\tcorpus-id\tscore\nq2\td9\t1\n"},
            "'d9', which is no text",
        ),
        (
            {"qrels": "query-id\tcorpus-id\tscore\nq9\td1\t1\n"},
            "'q9', which is no query",
        ),
        ({"qrels": "query-id\tcorpus-id\tscore\nq1\td1\t0\n"}, "no score above 0"),
        ({"queries.jsonl": [{"_id": "q", "text": "a"}] * 2}, "has the _id 'q' twice"),
        ({"queries.jsonl": [{"_id": "q", "text": 3}]}, "text='3', must be text"),
        ({"corpus.jsonl": [{"id": "q"}]}, "needs a column '_id'"),
        (
            {
                "qrels_test.jsonl": [
                    {"query-id": "q1", "corpus-id": "d1", "score": 10**400}
                ]
            },
            "row 0 .*score='1000.*, must be a finite",
        ),
    ],
)
def test_retrieval_sets_that_are_none(tmp_path, change, said):
    path = write_retrieval(tmp_path / "set", **change)
    with pytest.raises(UserError, match=f"^data.retrieval=.*{said}"):
        sources.load(tasks.find(own(tmp_path, retrieval=path)), ("retrieval",))


def test_sets_are_for_vectors_alone(tmp_path):
    missing = tasks.find(own(tmp_path, retrieval=str(tmp_path)))
    with pytest.raises(UserError, match="must be a folder with corpus"):
        sources.load(missing, ("retrieval",))
    with pytest.raises(UserError, match="^data.pairs='x': is not for regression"):
        tasks.find(Data(task="stsb", pairs="x"))
    with pytest.raises(UserError, match="^data.extra_file='x': is for labelled rows"):
        tasks.find(own(extra_file="x"))


# Folders


def make_folder(folder, config=SIZES, seed=4):
    """A folder of sentence-transformers, with a tokenizer that knows `WORDS`."""
    from transformers import BertTokenizerFast

    params = random_params(config, seed)
    folder.mkdir()
    tensors, fields = to_hugging_face(params, config)
    huggingface.write_tensors(folder, tensors, fields)
    sentence_transformers.write(folder, params, config)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    tokenizers.write(tokenizer, folder, config)
    return params


def read(folder):
    settings = config_lib.Model(dropout=0.0)
    how = {"field": "model", "problem": "vectors", "model": settings}
    return sentence_transformers.load(folder, **how)


@pytest.mark.parametrize("config", KINDS)
def test_to_a_folder_and_back(config, tmp_path):
    params = make_folder(tmp_path / "st", config)
    again, found, _ = read(tmp_path / "st")
    assert again == dataclasses.replace(config, head=config.head)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    batch = batch_of()
    output = apply(config, params, batch)
    head = sentence_transformers.read(tmp_path / "st")
    vectors = head.vectors(
        np.asarray(output.hidden_states[-1]), batch["attention_mask"]
    )
    np.testing.assert_allclose(vectors, output.logits, atol=1e-5)


def test_what_the_files_say(tmp_path):
    """They are as sentence-transformers writes them, without an idle layer."""
    config = dataclasses.replace(DENSE, head="mean", normalize=True)
    make_folder(tmp_path / "st", config)
    modules = json.loads((tmp_path / "st" / "modules.json").read_text())
    kinds = ["Transformer", "Pooling", "Dense", "Normalize"]
    assert [each["type"].rpartition(".")[2] for each in modules] == kinds
    paths = ["", "1_Pooling", "2_Dense", "3_Normalize"]
    assert [each["path"] for each in modules] == paths
    pooling = json.loads((tmp_path / "st" / "1_Pooling" / "config.json").read_text())
    assert pooling["word_embedding_dimension"] == 16
    modes = {k for k, v in pooling.items() if v is True and k.startswith("pooling")}
    assert modes == {"pooling_mode_mean_tokens"}
    wide = slicing.keep_width(random_params(SIZES, 0), SIZES)
    (tmp_path / "same").mkdir()
    sentence_transformers.write(tmp_path / "same", *wide)
    names = json.loads((tmp_path / "same" / "modules.json").read_text())
    assert [each["path"] for each in names] == ["", "1_Pooling", "2_Normalize"]


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda f: (f / "modules.json").unlink(),
            "has no modules.json; must be a folder",
        ),
        (
            lambda f: (f / "modules.json").write_text("[{}]"),
            "cannot be read .lacks 'type'",
        ),
        (
            lambda f: (f / "modules.json").write_text("[]"),
            "lists nothing; must be Transf",
        ),
        (
            lambda f: (f / "modules.json").write_text(
                (f / "modules.json").read_text().replace("Dense", "WordWeights")
            ),
            "WordWeights.*; must be Transformer and Pooling, then perhaps Dense",
        ),
        (
            lambda f: (f / "modules.json").write_text(
                (f / "modules.json").read_text().replace("1_Pooling", "../1_Pooling")
            ),
            "outside of the folder",
        ),
        (
            lambda f: (f / "1_Pooling" / "config.json").unlink(),
            "1_Pooling/config.json cannot be read .No such file",
        ),
        (
            lambda f: (f / "2_Dense" / "config.json").write_text("["),
            "2_Dense/config.json cannot be read",
        ),
        (
            lambda f: edit(
                f / "1_Pooling" / "config.json",
                pooling_mode_max_tokens=False,
                pooling_mode_weightedmean_tokens=True,
            ),
            "pooling is .'weightedmean_tokens'., must be one of mean, cls, max",
        ),
        (
            lambda f: edit(
                f / "1_Pooling" / "config.json", pooling_mode=["cls", "max"]
            ),
            "must be one of mean, cls, max",
        ),
        (
            lambda f: edit(
                f / "2_Dense" / "config.json", activation_function="torch.Sin"
            ),
            "activation_function is 'torch.Sin', must be one of torch.nn",
        ),
        (
            lambda f: edit(f / "2_Dense" / "config.json", use_residual=True),
            "use_residual is True, must be False",
        ),
        (
            lambda f: (f / "2_Dense" / "model.safetensors").unlink(),
            "must hold model.safe",
        ),
    ],
)
def test_folders_that_are_not_known(spoil, said, tmp_path):
    make_folder(tmp_path / "st", DENSE)
    spoil(tmp_path / "st")
    with pytest.raises(UserError, match=said) as caught:
        read(tmp_path / "st")
    assert str(caught.value).startswith("model=") and str(caught.value).isprintable()


def test_prompts_and_other_similarities_are_said(tmp_path, capsys):
    make_folder(tmp_path / "st")
    path = tmp_path / "st" / "config_sentence_transformers.json"
    edit(path, prompts={"query": "", "document": ""}, similarity_fn_name=None)
    read(tmp_path / "st")
    assert capsys.readouterr().err == ""
    edit(path, prompts={"query": "query: ", "none": ""}, similarity_fn_name="dot")
    read(tmp_path / "st")
    said = capsys.readouterr().err
    assert "its prompts, 'query', are neither put in front of texts nor kept" in said
    assert "similarity_fn_name is 'dot'; similarities are cosines" in said


def test_newer_fields_of_pooling(tmp_path):
    make_folder(tmp_path / "st", DENSE)
    about = {"embedding_dimension": 16, "pooling_mode": "cls"}
    (tmp_path / "st" / "1_Pooling" / "config.json").write_text(json.dumps(about))
    assert read(tmp_path / "st")[0].head == "cls"


# Other runtimes


@pytest.mark.parametrize("config", KINDS)
def test_a_graph_holds_the_pooling(config, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    params, batch = random_params(config, seed=5), batch_of()
    to_onnx.write(tmp_path, params, config, ())
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (output,) = session.get_outputs()
    assert output.name == "sentence_embedding"
    assert output.shape == ["batch_size", config.num_labels]
    found = to_onnx.load(tmp_path)(batch)
    np.testing.assert_allclose(found, apply(config, params, batch).logits, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("config", "runtime"),
    [
        (SIZES, to_transformers),
        (SIZES, to_stock_bert),
        (KINDS[1], to_stock_bert),
        (KINDS[2], to_transformers),
        (KINDS[3], to_transformers),
    ],
)
def test_sentence_transformers_gives_the_same(config, runtime, tmp_path, code_cache):
    """Also of a model whose hidden dimensions are cut."""
    library = pytest.importorskip("sentence_transformers")
    params = make_folder(tmp_path / "dense", config)
    theirs = library.SentenceTransformer(str(tmp_path / "dense"), device="cpu")
    tokenizer = tokenizers.load_tokenizer(tmp_path / "dense", "model")
    some = texts(5)

    def ours(config, params):
        rows = tokenizer(some, padding=True, truncation=True, max_length=12)
        names = ("input_ids", "attention_mask", "token_type_ids")
        batch = {name: np.array(rows[name], np.int32) for name in names}
        return apply(config, params, batch).logits

    theirs.save(str(tmp_path / "saved"))  # with the fields of the newest version
    again, found, _ = read(tmp_path / "saved")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, found, params)
    theirs.max_seq_length = 12
    expected = ours(config, params)
    np.testing.assert_allclose(theirs.encode(some), expected, atol=1e-4)
    wide, sizes = slicing.keep_width(params, config)
    masks = {
        "hidden": jnp.asarray(np.arange(16) % 4 > 0, jnp.float32),
        "head": jnp.array([[0, 1], [1, 1.0]]),
    }
    small, spec = cofi.prune(wide, masks, sizes)
    folder, sizes = tmp_path / "small", spec.config(sizes)
    folder.mkdir()
    runtime.write(folder, small, sizes, ())
    tokenizers.write(tokenizer, folder, sizes, max_length=12)
    trust = {"trust_remote_code": True} if runtime is to_transformers else {}
    theirs = library.SentenceTransformer(str(folder), device="cpu", **trust)
    found = theirs.encode(some)
    assert found.shape == (5, config.num_labels)
    np.testing.assert_allclose(found, ours(sizes, small), atol=1e-4)


@pytest.mark.torch
def test_sentence_transformers_needs_no_jax(tmp_path, code_cache):
    pytest.importorskip("sentence_transformers")
    params = make_folder(tmp_path / "dense")
    tokenizer = tokenizers.load_tokenizer(tmp_path / "dense", "model")
    for runtime, name in ((to_transformers, "transformers"), (to_stock_bert, "stock")):
        folder = tmp_path / name
        folder.mkdir()
        runtime.write(folder, params, SIZES, ())
        tokenizers.write(tokenizer, folder, SIZES, max_length=12)
    program = f"""
import json
from sentence_transformers import SentenceTransformer
found = []
for name in ("transformers", "stock"):
    folder = {str(tmp_path)!r} + "/" + name
    remote = name == "transformers"
    model = SentenceTransformer(folder, trust_remote_code=remote, device="cpu")
    found.append(model.encode({texts(5)}).tolist())
print(json.dumps(found))
"""
    rows = tokenizer(texts(5), padding=True, truncation=True, max_length=12)
    batch = {name: np.array(rows[name], np.int32) for name in rows}
    expected = apply(SIZES, params, batch).logits
    for found in printed_without(WITHOUT_US, program, code_cache):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_card_says_how_vectors_are_made_and_scored():
    scores = {"validation": {"agreement": 1.0, "cosine": 1.0}}
    card = model_card.text(DENSE, {"scores": scores, "data": vars(own())}, {})
    assert "Classes" not in card and " has 5 dimensions: it is the largest" in card
    assert "tokens, mapped by a linear layer and tanh." in card
    assert "also among the ten nearest by the model's own" in card
    card = model_card.text(SIZES, {"data": vars(own())}, {})
    said = "has 16 dimensions: it is the mean of the last hidden states of its tokens, "
    assert f"{said}divided by its length." in card and "nearest" not in card


# A whole run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run in which a fourth of the hidden dimensions is cut at once."""
    folder = tmp_path_factory.mktemp("vectors")
    make_folder(folder / "st")
    (folder / "texts.txt").write_text("\n".join(texts(40)))
    pairs = zip(texts(12, 1), texts(12, 2), strict=True)
    rows = [f"{i},{a},{b}\n" for i, (a, b) in enumerate(pairs)]
    (folder / "pairs.csv").write_text("label,sentence1,sentence2\n" + "".join(rows))
    config = settings(folder)
    config.data.pairs = str(folder / "pairs.csv")
    config.data.retrieval = write_retrieval(folder / "set")
    run_lib.run(config, folder / "run")
    return folder


def settings(folder):
    config = recipe.get_config("0.6")
    config.teacher.path = str(folder / "st")
    config.data.path = str(folder / "texts.txt")
    config.data.max_length, config.data.buckets = 12, (12,)
    config.prune.targets, config.prune.structure.hidden = (0.6,), 0.75
    config.prune.seeds, config.prune.seed_batches = "importance", 1
    config.prune.reconstruction_batches = 0
    config.prune.epochs = config.prune.warmup_epochs = 0
    config.finetune.epochs, config.finetune.batch_size = 3, 16
    config.benchmark.seq_length, config.benchmark.repeats = 12, 1
    config.benchmark.batch_size = config.eval_batch_size = 16
    return config


def test_a_run_keeps_the_width(workdir):
    _, sliced, _ = cofi.load_model(workdir / "run" / "pruned")
    assert sliced["classifier"]["kernel"].shape == (12, 16)
    report = json.loads((workdir / "run" / "report.json").read_text())
    for model in ("teacher", "pruned"):
        found = report[model]["scores"]
        assert [*found] == ["validation", "retrieval"]
        assert [*found["validation"]] == ["spearman", "pearson"]
        assert [*found["retrieval"]] == ["ndcg_at_10", "recall_at_10"]
    assert report["metric"] == "spearman" and report["kept"]["hidden"] == 12
    lines = (workdir / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(x)["loss"] for x in lines if '"loss"' in x]
    assert np.isfinite(losses).all()


def test_the_pipeline_gives_vectors_and_says_what_is_cut(workdir, capsys):
    model = cofi.pipeline(workdir / "run" / "pruned")
    long = " ".join(WORDS)
    found = [answer["vector"] for answer in model(["w1 w2", long, long + " w3"])]
    assert "2 of 3 texts are longer than data.max_length=12" in capsys.readouterr().err
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(found[1], found[2], atol=1e-6)
    assert len(found[0]) == 16 and not np.allclose(found[0], found[1])


def test_models_are_scored_by_the_first_where_there_are_no_pairs(workdir):
    """The folder that the teacher came from gives the same vectors."""
    models = [str(workdir / "run" / name) for name in ("teacher", "pruned")]
    models.append(str(workdir / "st"))
    found = evaluate.evaluate(
        models, data={"pairs": "", "retrieval": ""}, repeats=1, seq_lengths=[12]
    )
    teacher, pruned, folder = found["models"]
    assert found["metric"] == "agreement" and teacher["score"] == folder["score"] == 1
    assert "by the vectors of teacher, that are also" in tables.evaluation(found)
    cosines = [each["scores"]["validation"]["cosine"] for each in found["models"]]
    assert cosines == pytest.approx([1, cosines[1], 1]) and 0 < cosines[1] < 0.9999
    with pytest.raises(UserError, match="^data.label_column='gold': is not for vec"):
        evaluate.evaluate(models[:1], data={"label_column": "gold"})
    pairs = str(workdir / "pairs.csv")
    with pytest.raises(UserError, match="^data='x': goes without --config.data.pairs"):
        evaluate.evaluate(models[:1], data_path="x", data={"pairs": pairs})
    found = evaluate.evaluate(models[:1], data_path=pairs, repeats=1, seq_lengths=[12])
    assert found["metric"] == "spearman" and found["data"] == pairs


@pytest.mark.torch
def test_exports_are_checked(workdir, code_cache):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("sentence_transformers")
    path = workdir / "run" / "pruned"
    checks = export.export(path, ["transformers", "onnx"], repeats=1, batch_size=2)
    for check in checks.values():
        assert check["max_abs_difference"] < 1e-4 and check["rows"] == 24
        assert check["scores"] == pytest.approx(check["reference_scores"], abs=1e-5)
    card = (path / "README.md").read_text()
    assert "SentenceTransformer(folder, trust_remote_code=True)" in card
    assert "pipeline_tag: sentence-similarity" in card


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("teacher.path", "", "must be a folder of sentence-transformers"),
        ("model.path", "path/to/other", "must be empty: the student starts from"),
        ("distill.logits", 0.0, "must be above 0"),
    ],
)
def test_a_teacher_alone_says_what_is_learned(workdir, field, value, said):
    config = settings(workdir)
    section, _, name = field.partition(".")
    setattr(getattr(config, section), name, value)
    with pytest.raises(UserError, match=f"^{field}={value!r}: {said}"):
        setup.load_inputs(config)


def test_a_digest_holds_what_vectors_are_scored_by(workdir):
    config = settings(workdir)
    config.data.pairs = str(workdir / "pairs.csv")
    config.data.retrieval = str(workdir / "set")
    inputs = setup.load_inputs(config)
    before, examples = setup.digest(config, inputs), inputs.examples
    examples["validation"].uncut.similarities[0] += 1
    after = setup.digest(config, inputs)
    examples["retrieval"].uncut.relevant[0][1] += 1
    assert len({before, after, setup.digest(config, inputs)}) == 3


def test_hidden_dimensions_that_are_not_pruned_need_no_layer(workdir):
    config = settings(workdir)
    config.prune.structure = config_lib.Structure()
    config.prune.epochs = config.prune.warmup_epochs = 1
    assert isinstance(config, Config) and "hidden" not in config.prune.kinds
    inputs = setup.load_inputs(config)
    assert "classifier" not in inputs.params
    assert inputs.examples["validation"].labels.shape == (4, 16)
    config.prune.kinds = (*config.prune.kinds, "hidden")
    assert setup.load_inputs(config).params["classifier"]["kernel"].shape == (16, 16)
