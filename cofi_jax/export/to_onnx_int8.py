"""An ONNX graph in int8, made by onnxruntime's own quantizer, with a certificate.

The folder holds the same files as that of `to_onnx`, whose float32 graph is quantized:

    weights      once, symmetrically, each output of a layer with a scale of its own
    activations  in every pass, with one scale for a whole batch
    products     of uint8 activations with int8 weights, summed up in int32

The weights have 7 bits, in [-64, 64]. CPUs without VNNI add two neighbouring products
of 8 bits in 16 bits, where they saturate in silence; with 7 bits all CPUs compute the
same, at the same speed. Unsigned weights would not saturate either, but onnxruntime
multiplies them more slowly. The table of word embeddings has 8 bits and one scale.
"""

import contextlib
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cofi_jax.data.problems import PROBLEMS
from cofi_jax.errors import reject
from cofi_jax.evaluation import timing
from cofi_jax.export import certificate, to_onnx, verify
from cofi_jax.export.base import Format
from cofi_jax.models.config import EncoderConfig
from cofi_jax.report.model_card import Part

_GRAPH, _DATA = "model.onnx", "model.onnx.data"
_WORDS = "bert.embeddings.word_embeddings"
# The classifiers stay in float32: they take no time, and they compute the logits.
_FLOAT = {problem.classifier for problem in PROBLEMS.values()}
_SECONDS = 60.0  # for the search of products that int8 harms
_SAMPLE = 64  # rows that a product is tried on


def write(
    folder: Path, params: dict, config: EncoderConfig, labels: Sequence[str]
) -> None:
    """Writes the quantized graph and the files that describe it: see `Format.write`.

    Raises:
      UserError: where there is not one label for each class.
    """
    with tempfile.TemporaryDirectory() as source:
        to_onnx.write(Path(source), params, config, labels)
        quantize(Path(source), folder)


def quantize(source: Path, folder: Path, kept: Sequence[str] = ()) -> None:
    """Stores the float32 model of one folder in int8 in another one.

    Args:
      source: what `to_onnx.write` wrote.
      folder: an existing folder; files of the same names are written over.
      kept: names out of `products` that stay in float32.
    """
    import onnx
    from onnxruntime import quantization

    chosen = {f"{_WORDS}.weight"}
    chosen |= {f"{name}.weight" for name in products(source) if name not in kept}
    graph = onnx.load(source / _GRAPH, load_external_data=False).graph
    nodes = [node.name for node in graph.node if chosen & set(node.input)]
    # The quantizer makes MatMul nodes of Gemm nodes first, and gives them this name.
    nodes += [f"{name}_MatMul" for name in nodes]
    with _without_its_advice():
        quantization.quantize_dynamic(
            source / _GRAPH,
            folder / _GRAPH,
            per_channel=True,
            reduce_range=True,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_quantize=nodes,
        )
    for path in source.iterdir():
        if path.name not in (_GRAPH, _DATA):
            shutil.copy(path, folder)
    (folder / _DATA).touch()  # transformers asks for this file.


@contextlib.contextmanager
def _without_its_advice() -> Iterator[None]:
    """Keeps the quantizer from logging advice, and from setting up the logging."""
    root, handlers = logging.root, [*logging.root.handlers]

    def nothing(record):
        return False

    root.addFilter(nothing)
    try:
        yield
    finally:
        root.removeFilter(nothing)
        root.handlers[:] = handlers


def products(folder: Path) -> list[str]:
    """The names of the layers that a quantized graph computes in int8.

    Args:
      folder: what `to_onnx.write` wrote.
    """
    import onnx

    graph = onnx.load(folder / _GRAPH, load_external_data=False).graph
    return [name for name in _gemms(graph) if name not in _FLOAT]


def _gemms(graph):
    """The nodes that multiply by a weight, each by the name of its layer."""
    return {
        node.input[1].removesuffix(".weight"): node
        for node in graph.node
        if node.op_type == "Gemm"
    }


def check(form: Format, folder: Path, subject: verify.Subject) -> dict[str, Any]:
    """Certifies what `write` wrote into the folder: see `Format.check`.

    Where it loses too much, the few products that int8 harms most are put back into
    float32, if that helps.

    Raises:
      UserError: where it loses too much all the same.
    """
    rows = subject.rows
    task, examples, expected = rows.task, rows.examples, rows.logits
    own = "pruned" if subject.dense else "dense"
    own_int8 = f"{own} int8"
    with tempfile.TemporaryDirectory() as scratch:
        folders = _write_all(Path(scratch), subject, own)
        folders[own_int8] = folder
        results = {own: certificate.result(task, examples, expected)}
        scored = ["dense", "dense int8"] * bool(subject.teacher) + [own_int8]
        for name in scored:
            results[name] = _result(form, folders[name], subject, name != own_int8)
        kept = []
        if _loses(subject, results[own], results[own_int8]):
            kept = _rescue(folders[own], folder, subject, results[own])
            if kept:
                quantize(folders[own], folder, kept)
                results[own_int8] = _result(form, folder, subject)
            if _loses(subject, results[own], results[own_int8]):
                raise _refused(form, subject, results[own], results[own_int8])
        threads = timing.cores()
        timed = certificate.time(
            {n: to_onnx.load(each, threads=threads) for n, each in folders.items()},
            subject.model.config.vocab_size,
            **subject.sizes,
            last=own_int8,
        )
        models = {name: {"bytes": _bytes(each)} for name, each in folders.items()}
    for name, found in results.items():
        models[name]["scores"] = found.scores
    pairs = [(own, own_int8)]
    if subject.teacher:
        others = [name for name in models if name != "dense"]
        pairs = [("dense", name) for name in others] + pairs
    changes = [
        {"from": one, "to": other}
        | certificate.compare(task, examples, results[one], results[other])
        for one, other in pairs
    ]
    return {
        "format": form.name,
        **rows.described,
        "max_abs_difference": changes[-1]["max_abs_difference"],
        "scores": results[own_int8].scores,
        "reference_scores": results[own].scores,
        "certificate": {
            "max_loss": subject.max_loss,
            "models": models,
            "changes": changes,
            "kept_in_float32": kept,
            "cpu": certificate.cpu(),
        },
        "versions": verify.versions(_PACKAGES),
        **timed,
    }


def _write_all(scratch, subject, own):
    """Writes what the int8 model is compared with; returns the folders by name."""
    models = {own: subject.model}
    if subject.dense:
        models = {"dense": subject.teacher or subject.dense} | models
    folders = {}
    for name, model in models.items():
        for each in (name, f"{name} int8"):
            folders[each] = scratch / each
            folders[each].mkdir()
        to_onnx.write(folders[name], model.params, model.config, subject.labels)
        if name != own:
            quantize(folders[name], folders[f"{name} int8"])
    return folders


def _result(form, folder, subject, of_teacher=False):
    """The `certificate.Result` of a written model."""
    task, examples = subject.rows.task, subject.rows.examples
    if of_teacher:
        task = subject.teacher.task or task
    logits = verify.logits_of(to_onnx.load(folder), task, examples)
    if not np.isfinite(logits).all():
        legal = "gives logits that are not numbers; not written"
        raise reject("formats", form.name, legal)
    return certificate.result(task, examples, logits)


def _loses(subject, before, after):
    return certificate.loses(subject.task, before, after, subject.max_loss)


def _refused(form, subject, before, after):
    """The error of a model that loses too much."""
    metric = subject.task.metrics[0]
    error = certificate.standard_error(metric, before, after)
    legal = (
        f"the {metric} of {form.name} falls from {before.scores[metric]:.4f} to "
        f"{after.scores[metric]:.4f} (standard error of the difference {error:.4f}); "
        "not written. A larger --max_loss writes it all the same"
    )
    return reject("max_loss", subject.max_loss, legal)


def _rescue(source, folder, subject, expected):
    """Looks for the few products by which int8 loses the most of the score.

    Each is put back into float32 alone, and what that does to the logits of some rows
    is measured, for half of the time. Then the best are put back together, one more
    each time.

    Args:
      source: the float32 model.
      folder: that model in int8.
      subject: the subject of the check.
      expected: the float32 model's `certificate.Result`.

    Returns:
      The names of the products that must stay in float32 for the loss to be allowed,
      at most a quarter of all, rounded up; [] where none are found within a minute.
    """
    task, examples = subject.rows.task, subject.rows.examples
    start = time.monotonic()
    trials = _Trials(source, folder)
    rows = np.linspace(0, len(examples) - 1, min(_SAMPLE, len(examples))).astype(int)
    some, wanted = examples.take(rows), expected.logits[rows]
    errors = {}
    for name in products(source):
        if time.monotonic() - start > _SECONDS / 2:
            break
        found = verify.logits_of(trials.predict([name]), task, some)
        errors[name] = np.square(verify.differences(found, wanted, some)).mean()
    ranked = sorted(errors, key=errors.__getitem__)
    for count in range(1, math.ceil(len(errors) / 4) + 1):
        if time.monotonic() - start > _SECONDS:
            break
        found = verify.logits_of(trials.predict(ranked[:count]), task, examples)
        found = certificate.result(task, examples, found)
        if not _loses(subject, expected, found):
            return ranked[:count]
    return []


class _Trials:
    """A quantized model in which chosen products are those of the float32 one again.

    The quantizer would take seconds for each choice. It leaves the inputs and outputs
    of products their names, so a node of one graph fits into the other.
    """

    def __init__(self, source, folder):
        import onnx

        graph = onnx.load(source / _GRAPH).graph
        self.model, self.gemms = onnx.load(folder / _GRAPH), _gemms(graph)
        self.constants = {each.name: each for each in graph.initializer}

    def predict(self, kept):
        """What `to_onnx.load` gives for the model with `kept` in float32."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        graph = model.graph
        there = {each.name for each in graph.initializer}
        for node in map(self.gemms.__getitem__, kept):
            (place,) = (
                place
                for place, other in enumerate(graph.node)
                if other.output[0] == node.output[0]
            )
            graph.node[place].CopyFrom(node)
            missing = [name for name in node.input[1:] if name not in there]
            graph.initializer.extend(self.constants[name] for name in missing)
        with tempfile.TemporaryDirectory() as folder:
            onnx.save_model(model, Path(folder) / _GRAPH)
            return to_onnx.load(Path(folder))


def _bytes(folder):
    return sum((folder / name).stat().st_size for name in (_GRAPH, _DATA))


_NAME = "onnx-int8"
_FLOAT_CARD = to_onnx.FORMAT.card
_CARD = Part(
    "onnxruntime on a CPU",
    "an ONNX graph with 8-bit integers in place of float32",
    _FLOAT_CARD.snippet.replace(f'/{to_onnx.FORMAT.name}"', f'/{_NAME}"'),
    lambda check: (
        f"The speedup of `{_NAME}/` is that over the dense model in float32."
        if "certificate" in check
        else ""
    ),
    certificate.section,
)

_PACKAGES = to_onnx.FORMAT.packages

FORMAT = Format(
    _NAME,
    write,
    to_onnx.load,
    _CARD,
    packages=_PACKAGES,
    extra=to_onnx.FORMAT.extra,
    facts=lambda config: {"weights": "int8"},
    check=check,
    lossy=True,
)
