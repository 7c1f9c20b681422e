"""Rankings: what rows may hold, losses within queries, scores and answers."""

import json

import jax
import numpy as np
import pyarrow
import pytest
import sklearn.metrics
from conftest import WITHOUT_US, complaint, printed_without, random_params
from pyarrow import parquet
from scipy.special import expit

import cofi_jax as cofi
from cofi_jax import config
from cofi_jax.checkpoints import load as load_lib
from cofi_jax.checkpoints import tokenizers
from cofi_jax.data import batches, sources, tasks, toy
from cofi_jax.data.problems import PROBLEMS
from cofi_jax.export import certificate, to_stock_bert, to_transformers, verify
from cofi_jax.models.config import EncoderConfig

METRICS = ("ndcg_at_10", "mrr_at_10", "recall_at_10")
PAIRS = [("the film was", "a dull plot"), ("the plot", "was great but long")]


pytestmark = pytest.mark.usefixtures("quick_compile")


def own(path="", **more):
    fields = {"columns": ("query", "passage"), "problem": "ranking"} | more
    return config.Data(task="own", path=str(path), **fields)


def write(folder, labels, split="train", queries=None, **columns):
    """A row for each label, of the queries that the letters of `queries` stand for."""
    table = {
        "query": [f"the film {letter}" for letter in queries or "a" * len(labels)],
        "passage": [f"{split} {row}" for row in range(len(labels))],
        "label": labels,
        **columns,
    }
    parquet.write_table(pyarrow.table(table), folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return toy.demo_tokenizer()


def load(data, tokenizer, split="train"):
    """The labels of a split, as a batch holds them."""
    task, columns = sources.load(tasks.find(data), (split,))
    return task.tokenise(columns[split], tokenizer, training=split == "train").labels


# Rows


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([0, 1, 1, 0], [0, 1, 1, 0]),
        ([False, True, True, False], [0, 1, 1, 0]),
        ([0, 3, 1, 2], [0, 1, 1 / 3, 2 / 3]),
        ([0.0, 0.25, 0.9, 0.5], [0, 0.25, 0.9, 0.5]),
    ],
)
def test_relevance_is_scaled_by_its_highest_grade(
    tmp_path, tokenizer, cells, expected, capsys
):
    write(tmp_path, cells)
    labels = load(own(tmp_path), tokenizer)
    np.testing.assert_allclose(labels[:, 0], np.float32(expected), rtol=1e-6)
    assert np.isnan(labels[:, 1]).all() and labels.dtype == np.float32
    assert not capsys.readouterr().err


def test_negative_labels_are_logits_of_a_model(tmp_path, tokenizer, capsys):
    write(tmp_path, [2.0, 0.5, -3.0, -1.0])
    labels = load(own(tmp_path), tokenizer)
    np.testing.assert_array_equal(labels[:, 1], np.float32([2, 0.5, -3, -1]))
    np.testing.assert_allclose(labels[:, 0], expit([2, 0.5, -3, -1]), rtol=1e-6)
    said = capsys.readouterr().err
    assert "2 of 4 labels are negative, as in row 2 " in said and "logits" in said


def test_rows_of_a_query_are_known_by_its_text_or_by_a_column(tmp_path, tokenizer):
    ids = [7.0, 7.0, 9.0, 9.0]
    write(tmp_path, [1, 0, 1, 0], queries="abab", id=ids)
    assert load(own(tmp_path), tokenizer)[:, 2].tolist() == [0, 1, 0, 1]
    data = own(tmp_path, group_column="id")
    assert load(data, tokenizer)[:, 2].tolist() == [0, 0, 1, 1]
    (tmp_path / "train.parquet").unlink()
    rows = "id,label,query,passage\n7,1,a,b\n7,0,b,c\n9,1,a,d\n9,0,b,e\n"
    (tmp_path / "train.csv").write_text(rows)
    assert load(data, tokenizer)[:, 2].tolist() == [0, 0, 1, 1]


def test_all_files_of_a_split_have_one_scale(tmp_path, tokenizer):
    write(tmp_path, [0, 4])
    (tmp_path / "train.parquet").rename(tmp_path / "train-00000-of-00002.parquet")
    write(tmp_path, [2, 1], queries="ba")
    (tmp_path / "train.parquet").rename(tmp_path / "train-00001-of-00002.parquet")
    labels = load(own(tmp_path), tokenizer)
    assert labels[:, ::2].T.tolist() == [[0, 1, 0.5, 0.25], [0, 0, 1, 0]]


@pytest.mark.parametrize(
    ("cells", "row"),
    [
        ([1.0, None], 1),
        ([0, 1, None, 1], 2),
        (["no", "yes"], 0),
        ([[1], [0]], 0),
        ([0.0, float("nan")], 1),
        ([float("inf"), 0.0], 0),
    ],
)
def test_labels_that_are_none(tmp_path, cells, row, tokenizer):
    message = complaint(load, own(write(tmp_path, cells)), tokenizer)
    assert f"train.parquet, row {row} (the first is 0) has label=" in message
    assert message.endswith(
        "must be a finite number: 0 or 1, a grade, or a model's score"
    )


def test_queries_that_are_missing_or_misplaced(tmp_path):
    write(tmp_path, [1, 0], id=[1, None])
    message = complaint(load, own(tmp_path, group_column="id"), None)
    assert message.endswith("row 1 (the first is 0) has no value in 'id'")
    message = complaint(load, own(tmp_path, group_column="key"), None)
    assert "needs a column 'key'" in message
    for fields, said in (
        ({"columns": ("query",)}, "data.columns=('query',): the task own needs the "),
        ({"group_column": "query"}, "names one twice"),
        ({"group_column": "label"}, "names one twice"),
        ({"group_column": "id", "problem": "regression"}, "data.group_column='id'"),
        ({"labels": ("no", "yes")}, "data.labels=('no', 'yes')"),
        ({"metrics": ("accuracy",)}, "data.metrics=('accuracy',)"),
    ):
        assert said in complaint(tasks.find, own(tmp_path, **fields))


def test_queries_without_a_relevant_passage(tmp_path, tokenizer, capsys):
    write(tmp_path, [0, 0, 1, 0, 0], "validation", queries="aabbc")
    labels = load(own(tmp_path), tokenizer, "validation")
    assert len(labels) == 5
    said = capsys.readouterr().err
    assert "2 of 3 queries have no relevant passage; the scores leave them out" in said
    write(tmp_path, [0, 0, 0], "validation", queries="aab")
    message = complaint(load, own(tmp_path), tokenizer, "validation")
    assert message.startswith("data.path=") and "label is above 0" in message
    write(tmp_path, [0, 0, 0])  # A teacher may say more of rows to train on.
    assert len(load(own(tmp_path), tokenizer)) == 3


def test_a_query_in_both_splits_is_said(tmp_path, capsys):
    write(tmp_path, [0, 1, 1], queries="aab", id=[1, 1, 2])
    write(tmp_path, [0, 1, 1], "validation", queries="bbc", id=[1, 1, 2])
    for fields in ({}, {"group_column": "id"}):  # whose values may be of a split
        sources.load(tasks.find(own(tmp_path, **fields)), ("train", "validation"))
        said = capsys.readouterr().err
        assert (
            "1 of the 2 queries of validation are also in the training rows, as "
            in said
        )
        assert "'the film b'" in said
    sources.load(tasks.find(own(tmp_path)), ("validation",))
    assert not capsys.readouterr().err


# Losses


GROUPS = np.float32([0, 1, 0, 1, 1, 2, 1])
WEIGHT = np.float32([1, 1, 1, 1, 1, 1, 0])


def batch_of(relevance, logit=np.nan):
    labels = np.stack([relevance, np.full(7, logit), GROUPS], -1)
    return {"labels": np.float32(labels), "weight": WEIGHT}


def distance_by_hand(gaps, rows):
    """The mean over `rows` of the squared gap and of those of its margins."""
    found = []
    for i in rows:
        others = [j for j in rows if j != i and GROUPS[j] == GROUPS[i]]
        margins = [(gaps[i] - gaps[j]) ** 2 for j in others]
        found.append(gaps[i] ** 2 + (np.mean(margins) if margins else 0))
    return np.mean(found)


@pytest.fixture
def draw():
    rng = np.random.default_rng(0)
    return lambda: np.float32(2 * rng.standard_normal((7, 1)))


def test_the_logits_of_a_teacher_and_their_margins(draw):
    student, teacher, problem = draw(), draw(), PROBLEMS["ranking"]
    batch = batch_of(np.zeros(7))
    gaps = np.float64(student - teacher)[:, 0]
    expected = distance_by_hand(gaps, range(6))
    for temperature in (1.0, 2.0):  # which has no say in logits
        found = problem.distill(student, teacher, batch, temperature)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    # A query whose logits are all too high by 3 pays for that alone.
    higher = teacher + 3 * (GROUPS == 1)[:, None]
    found = problem.distill(higher, teacher, batch, 1.0)
    np.testing.assert_allclose(found, 9 * 3 / 6, rtol=1e-5)


def test_relevance_is_learnt_by_cross_entropy(draw):
    """As sentence-transformers does: binary, and where it is a grade, its mixture."""
    logits, relevance = draw(), np.array([0, 1, 0.25, 1, 0, 1 / 3, 1])
    chances = expit(np.float64(logits))[:6, 0]
    wanted = relevance[:6]
    terms = wanted * np.log(chances) + (1 - wanted) * np.log(1 - chances)
    loss = jax.value_and_grad(PROBLEMS["ranking"].loss)
    found, gradient = loss(logits, batch_of(relevance))
    np.testing.assert_allclose(found, -terms.mean(), rtol=1e-5)
    expected = np.append((chances - wanted) / 6, 0)
    np.testing.assert_allclose(gradient[:, 0], expected, atol=1e-6)


def test_the_logits_of_labels_are_learnt_as_a_teachers(draw):
    logits, known = draw(), draw()
    batch = batch_of(np.zeros(7))
    batch["labels"][:, 1] = known[:, 0]
    loss = jax.value_and_grad(PROBLEMS["ranking"].loss)
    found, gradient = loss(logits, batch)
    distill = jax.value_and_grad(PROBLEMS["ranking"].distill)
    expected, its_gradient = distill(logits, known, batch, 1.0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, its_gradient, rtol=1e-5)
    # Where only some are known, there are no margins to the others.
    batch["labels"][3:, 1] = np.nan
    found, gradient = loss(logits, batch)
    gaps = np.float64(logits - known)[:, 0]
    cross = np.log1p(np.exp(np.float64(logits)))[3:6, 0]
    expected = (3 * distance_by_hand(gaps, range(3)) + cross.sum()) / 6
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.isfinite(gradient).all()


def test_rows_that_only_fill_a_batch_are_not_looked_at(draw):
    """They are copies of its first row, whose margins would be 0."""
    problem, batch, student, teacher = (
        PROBLEMS["ranking"],
        batch_of(GROUPS > 0),
        *(draw() for _ in range(2)),
    )
    rules = (
        lambda s, t: problem.loss(s, batch),
        lambda s, t: problem.distill(s, t, batch, 1.0),
    )
    before = [jax.value_and_grad(rule)(student, teacher) for rule in rules]
    student[6], teacher[6] = 77, -55
    for rule, (value, gradient) in zip(rules, before, strict=True):
        found, its_gradient = jax.value_and_grad(rule)(student, teacher)
        assert found == value and gradient[6] == 0
        np.testing.assert_array_equal(its_gradient, gradient)


# Scores and answers


def examples_of(relevance, groups):
    labels = np.stack([relevance, np.full(len(groups), np.nan), groups], -1)
    rows = [np.zeros(1, np.int32)] * len(labels)
    return batches.Examples(rows, rows, np.float32(labels))


def random_rows(grades, count=400, queries=30):
    """Queries of 1 to 40 passages in random order, some without a relevant one."""
    rng = np.random.default_rng(0)
    groups = rng.integers(queries, size=count) * rng.integers(2, size=count)
    groups = np.unique(groups, return_inverse=True)[1]
    relevance = rng.choice(
        grades, size=count, p=[0.8, *[0.2 / (len(grades) - 1)] * (len(grades) - 1)]
    )
    logits = rng.standard_normal((count, 1)) + relevance[:, None]
    return logits, relevance, groups


@pytest.mark.parametrize("grades", [(0, 1), (0, 1 / 3, 2 / 3, 1)])
def test_scores_are_those_of_scikit_learn(grades):
    """NDCG is; the others are counted by hand, query by query."""
    logits, relevance, groups = random_rows(grades)
    expected = {name: [] for name in METRICS}
    for query in range(groups.max() + 1):
        gold, given = relevance[groups == query], logits[groups == query, 0]
        if not gold.any():
            continue
        ndcg = sklearn.metrics.ndcg_score
        found = ndcg([gold], [given], k=10) if len(gold) > 1 else 1.0
        expected["ndcg_at_10"].append(found)
        wanted = [i for i in range(len(gold)) if gold[i] >= gold.max() / 2]
        top = [*np.argsort(-given)[:10]]
        places = [top.index(i) + 1 for i in wanted if i in top]
        expected["mrr_at_10"].append(1 / min(places) if places else 0)
        expected["recall_at_10"].append(len(places) / len(wanted))
    task, examples = tasks.find(own(metrics=METRICS)), examples_of(relevance, groups)
    assert 10 < len(expected["mrr_at_10"]) < groups.max() + 1
    assert task.scores(logits, examples) == {
        name: pytest.approx(np.mean(values), abs=1e-6)
        for name, values in expected.items()
    }
    # What is resampled are queries.
    count, score = task.scorer(logits, examples)
    assert count == len(expected["mrr_at_10"])
    chosen = np.random.default_rng(1).integers(count, size=count)
    for name, value in score(chosen).items():
        assert value == pytest.approx(
            np.mean(np.take(expected[name], chosen)), abs=1e-6
        )


def test_scores_by_hand():
    """The relevant passage is the second of three, and of 12 the eleventh."""
    logits = np.array([[3.0, 1, 2, *range(12, 0, -1)]]).T
    relevance = np.zeros(15)
    relevance[[2, 13]] = 1
    task = tasks.find(own(metrics=METRICS))
    examples = examples_of(relevance, np.repeat([0, 1], [3, 12]))
    expected = {
        "ndcg_at_10": 1 / np.log2(3) / 2,
        "mrr_at_10": 1 / 4,
        "recall_at_10": 0.5,
    }
    assert task.scores(logits, examples) == pytest.approx(expected)
    relevance[3] = 1  # and the first
    examples = examples_of(relevance, np.repeat([0, 1], [3, 12]))
    first = 1 / (1 + 1 / np.log2(3))  # 1 of the 2 gains that are possible
    assert task.scores(logits, examples) == pytest.approx(
        {
            "ndcg_at_10": (1 / np.log2(3) + first) / 2,
            "mrr_at_10": (1 / 2 + 1) / 2,
            "recall_at_10": (1 + 1 / 2) / 2,
        }
    )


def test_a_model_that_knows_nothing_gains_nothing_by_the_order_of_rows():
    """Of equal logits, the least relevant one comes first."""
    relevance = np.array([1, 0, 0, 0])
    task = tasks.find(own(metrics=METRICS))
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        examples = examples_of(relevance[order], np.zeros(4))
        scores = task.scores(np.zeros((4, 1)), examples)
        assert scores["mrr_at_10"] == 1 / 4 and scores["recall_at_10"] == 1
        assert scores["ndcg_at_10"] == pytest.approx(1 / np.log2(5))


def test_scores_do_not_depend_on_the_order_of_rows_or_the_numbers_of_queries():
    logits, relevance, groups = random_rows((0, 0.5, 1))
    task = tasks.find(own(metrics=METRICS))
    scores = task.scores(logits, examples_of(relevance, groups))
    order = np.random.default_rng(2).permutation(len(groups))
    mixed = examples_of(relevance[order], groups.max() - groups[order])
    assert task.scores(logits[order], mixed) == pytest.approx(scores)


def test_what_changes_between_two_models():
    """The first of two queries is answered worse; their difference has its error."""
    examples = examples_of([1, 0, 0, 1], [0, 0, 1, 1])
    task = tasks.find(own(metrics=("mrr_at_10",)))
    logits = [np.array([[first], [1.0], [0.0], [2.0]]) for first in (2.0, 0.0)]
    results = [certificate.result(task, examples, each) for each in logits]
    found = certificate.compare(task, examples, *results)
    assert found["differences"] == {"mrr_at_10": pytest.approx(-1 / 4)}
    assert found["standard_errors"] == {"mrr_at_10": pytest.approx(1 / 4)}
    assert "flips" not in found and "worst_recall" not in found
    assert verify.chosen(examples, 2).labels.shape == (2, 3)


def test_a_query_is_scored_by_all_of_its_passages(tmp_path, tokenizer):
    write(tmp_path, [1, 0, 0, 1], queries="aabb")
    task, columns = sources.load(tasks.find(own(tmp_path)), ("train",))
    examples = task.tokenise(columns["train"], tokenizer, training=True)
    assert verify.chosen(examples, 2) is examples
    assert examples.uncut.contexts == ["the film a", "the film b"]


def test_the_answer_is_a_score():
    found = PROBLEMS["ranking"].decode(np.array([[0.0], [-2.0]]), None, ())
    assert found == [{"score": 0.5}, {"score": pytest.approx(expit(-2.0))}]


def ranker(folder, form, tokenizer):
    """A cross-encoder in the folder, and the logits that it gives to `PAIRS`."""
    dense = form == "dense"
    model = EncoderConfig(
        hidden_size=16 if dense else 14,
        heads=(2, 2) if dense else (1, 0),
        head_size=8,
        intermediate=(16, 16) if dense else (6, 3),
        pooler_size=16,
        vocab_size=len(tokenizer),
        num_labels=1,
        max_positions=24,
        problem="ranking",
    )
    params = random_params(model, 0)
    params["classifier"]["kernel"] *= 30
    if dense:
        cofi.save_hugging_face(folder, params, model, tokenizer=tokenizer)
    else:
        folder.mkdir()
        runtime = {"transformers": to_transformers, "stock": to_stock_bert}[form]
        runtime.write(folder, params, model, ())
        tokenizers.write(tokenizer, folder, model)
    rows = tokenizer(*map(list, zip(*PAIRS, strict=True)), padding=True)
    batch = {name: np.array(rows[name], np.int32) for name in rows}
    logits = cofi.Encoder(model).apply({"params": params}, batch).logits
    assert np.std(logits) > 0.01
    return params, logits[:, 0]


@pytest.mark.torch
@pytest.mark.parametrize("form", ["dense", "transformers", "stock"])
def test_a_cross_encoder_of_sentence_transformers(
    form, tmp_path, tokenizer, code_cache
):
    """It gives the sigmoid of our logits, for all that we write."""
    library = pytest.importorskip("sentence_transformers")
    folder = tmp_path / form
    params, logits = ranker(folder, form, tokenizer)
    fields = json.loads((folder / "config.json").read_text())
    assert fields["sentence_transformers"]["activation_fn"].endswith(".Sigmoid")
    encoder = library.CrossEncoder(
        str(folder), trust_remote_code=True, local_files_only=True, device="cpu"
    )
    assert encoder.num_labels == 1
    np.testing.assert_allclose(encoder.predict(PAIRS), expit(logits), atol=1e-5)
    if form == "dense":  # Such a folder may be a teacher.
        found = load_lib.load_hugging_face(
            str(folder), tasks.find(own()), model=config.Model()
        )
        jax.tree.map(np.testing.assert_array_equal, found.params, params)
    ranked = encoder.rank(PAIRS[0][0], [pair[1] for pair in PAIRS])
    assert {each["corpus_id"] for each in ranked} == {0, 1}


@pytest.mark.torch
def test_a_cross_encoder_needs_no_jax(tmp_path, tokenizer, code_cache):
    pytest.importorskip("sentence_transformers")
    forms = ("transformers", "stock")
    expected = [expit(ranker(tmp_path / form, form, tokenizer)[1]) for form in forms]
    program = f"""
import json
from sentence_transformers import CrossEncoder
found = []
for form in {forms}:
    folder = {str(tmp_path)!r} + "/" + form
    remote = form == "transformers"
    model = CrossEncoder(folder, trust_remote_code=remote, device="cpu")
    found.append(model.predict({PAIRS}).tolist())
print(json.dumps(found))
"""
    np.testing.assert_allclose(
        printed_without(WITHOUT_US, program, code_cache), expected, atol=1e-5
    )
