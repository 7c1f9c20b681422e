"""Pages are whole, need nothing else, escape what they are given, hold the numbers."""

import html
import html.parser
import json
import pathlib
import subprocess
import sys

import hypothesis
import hypothesis.strategies
import markdown_it
import pytest
from test_report import make_metrics, make_report

from cofi_jax import config as config_lib
from cofi_jax.errors import UserError
from cofi_jax.models.config import EncoderConfig
from cofi_jax.report import compare, figures, model_card, pages, tables
from cofi_jax.report import html as html_lib

ROOT = pathlib.Path(__file__).parents[1]


VOID = {"meta", "link", "img", "br"}


# Punctuation above all, and what is longer or wider than one character in some form.
st_characters = hypothesis.strategies.sampled_from(
    "\\`*_{}[]()<>#+-.!|&~$:;\"'/ aZ9\u00e9\u2192\n\t"
)


HOSTILE = "</title><script>alert(1)</script>\"'><img src=x onerror=y>&amp;$x^"


CONFIG = config_lib.to_json(config_lib.Config())


class Page(html.parser.HTMLParser):
    """Fails where markup is not well-formed; keeps attributes, texts and tables."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text, self.rows = [], [], "", []
        self.feed(text)
        self.close()
        assert not self.open and not self.rawdata

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            assert "url(" not in data and "@import" not in data
            return
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def check(text):
    """What holds of every page; the parsed page."""
    found = Page(text)
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    allowed = set(
        "html head meta link title style body main h1 h2 h3 p section".split()
    )
    allowed |= set("div table thead tbody tr th td figure img dl dt dd".split())
    allowed |= {"details", "summary", "pre", "code", "ul", "li", "strong"}
    assert {tag for tag, _ in found.tags} <= allowed  # no script, no frame, no form
    for _, attrs in found.tags:
        assert not any(name.startswith("on") or name == "style" for name in attrs)
        for name in ("src", "href", "srcset", "data", "action"):
            assert attrs.get(name, "data:").startswith("data:")
    for attrs in found.all("img"):
        assert len(attrs["alt"]) > 20
        assert attrs["src"].startswith("data:image/svg+xml;base64,")
    boxes = [attrs for attrs in found.all("div") if attrs.get("class") == "scroll"]
    assert len(boxes) == len(found.all("table"))
    assert all(attrs["aria-label"] and attrs["tabindex"] == "0" for attrs in boxes)
    (policy,) = [a["content"] for a in found.all("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in (
        found.all("meta")
    )
    return found


@pytest.fixture(scope="module")
def one():
    return check(pages.run_page(make_report(), make_metrics(), CONFIG))


def test_a_page_holds_the_figures_that_matter(one):
    for part in (
        "0.924 → 0.906",
        "95.0 %",
        "12.3x",
        "11.9x to 12.7x",
        "NVIDIA H200, bfloat16, batches of 128 x 64 tokens",
        "85.0 M → 4.2 M",
        "differ by at most 3.2e-06",
        "teacher 1.5 min, prune 65.1 min",
        "jax 0.10.2",
    ):
        assert part in one.text


def test_tables_hold_the_numbers(one):
    for row in (
        ["accuracy", "0.9243", "0.9060", "-0.0183; 0.8933 before fine-tuning"],
        ["encoder parameters", "85,000,000", "4,250,000", "5.0 % left"],
        ["heads", "16", "7", "43.8 % left"],
        ["attention blocks", "4", "3", "75.0 % left"],
        ["hidden width", "64", "61", "95.3 % left"],
        ["latency of a batch", "41.23 ms", "3.35 ms"],
        ["1", "2 / 4", "30 / 256"],
        ["2", "absent", "64 / 256"],
        ["pruning", "300", "0.0 min", "-", "-", "0.8000"],
    ):
        assert row in [found[: len(row)] for found in one.rows]


def test_pictures_say_what_they_show(one):
    alts = [attrs["alt"] for attrs in one.all("img")]
    assert len(alts) == 7  # structure 2, pruning 2, scores, losses of two stages
    assert any("layer 1: 2 / 4; layer 2: absent" in alt for alt in alts)
    assert any("ends at 60.0 %" in alt and "rises to 95.0 %" in alt for alt in alts)


def test_best_of_the_pruning_stage_is_one_that_counts():
    lines = [(100, 0.9, {"counts": 0}), (200, 0.6, {}), (300, 0.5, {})]
    metrics = [
        {"stage": "prune", "step": step, "score": score, **more}
        for step, score, more in lines
    ]
    found = check(pages.run_page(make_report(), metrics, CONFIG))
    (row,) = [row for row in found.rows if row[0] == "pruning"]
    assert row[-2:] == ["0.6000", "0.5000"]
    assert any("pruning 0.6000" in attrs["alt"] for attrs in found.all("img"))


def test_a_run_of_several_models_shows_all_of_them(tmp_path):
    reports = [make_report(), make_report()]
    reports[0] |= {"target_sparsity": 0.6, "sparsity": 0.601, "speedup": 2.51}
    whole = reports[-1] | {"family": reports}
    metrics = [
        line | {"stage": f"{line['stage']}-{target}"}
        for target in (60, 95)
        for line in make_metrics()
    ]
    found = check(pages.run_page(whole, metrics, CONFIG))
    names = {row[0]: row for row in found.rows if len(row) == 6}
    stages = [
        "pruning, 60 %",
        "fine-tuning, 60 %",
        "pruning, 95 %",
        "fine-tuning, 95 %",
    ]
    assert [name for name in names if "ing, " in name] == stages
    targets = [
        cell for row in found.rows for cell in row if cell in ("60.0 %", "95.0 %")
    ]
    assert targets.count("60.0 %") == 1 and "2.5x" in found.text
    pages.write_run(tmp_path, whole, metrics, CONFIG)
    assert (tmp_path / "family.png").read_bytes().startswith(b"\x89PNG")
    figure = figures.draw(figures.course(whole, metrics))
    (expected,) = [x for x in figure.axes[0].lines if "expected" in x.get_label()]
    steps = [100, 200, 300, 400, 500, 600]
    assert expected.get_xdata().tolist() == steps


def test_the_exact_config_is_there(one):
    assert CONFIG in one.text and one.all("details")


def several_splits(content):
    scores = {"matched": {"accuracy": 0.8}, "mismatched": {"accuracy": 0.81}}
    content["teacher"]["scores"] = content["pruned"]["scores"] = scores
    return content


def spans(content):
    content |= {"task": "squad", "metric": "f1"}
    scores = {"validation": {"f1": 0.88, "exact_match": 0.81}}
    content["teacher"]["scores"] = content["pruned"]["scores"] = scores
    return content


def regression(content):
    content |= {"task": "stsb", "metric": "spearman"}
    scores = {"validation": {"spearman": -0.1, "pearson": 0.0}}
    content["teacher"]["scores"] = content["pruned"]["scores"] = scores
    return content


def nothing_left(content):
    content["kept"] |= {"heads": [0] * 4, "intermediate": [0] * 4}
    return content


@pytest.mark.parametrize(
    ("change", "row"),
    [
        (several_splits, ["accuracy, mismatched", "0.8100", "0.8100", "+0.0000"]),
        (spans, ["exact_match", "0.8100", "0.8100", "+0.0000"]),
        (regression, ["spearman", "-0.1000", "-0.1000"]),
        (nothing_left, ["FFN blocks", "4", "0", "0.0 % left"]),
    ],
)
def test_every_kind_of_report_has_a_page(change, row):
    found = check(pages.run_page(change(make_report()), [], "{}"))
    assert row in [cells[: len(row)] for cells in found.rows]


def test_hostile_text_is_only_text(recwarn):
    content = make_report() | {"task": HOSTILE, "metric": HOSTILE}
    content["benchmark"]["device"] = HOSTILE
    content["versions"] = {HOSTILE: HOSTILE}
    for model in ("teacher", "pruned"):
        content[model]["scores"] = {"validation": {HOSTILE: 0.5}}
    config = json.dumps({"model": {"path": HOSTILE}}, indent=2)
    found = check(pages.run_page(content, make_metrics(), config))
    assert found.text.count(HOSTILE) >= 5 and config in found.text
    found = check(pages.compare_page([(HOSTILE, content), (HOSTILE + "b", content)]))
    assert not recwarn
    assert found.text.count(HOSTILE) >= 5


def test_a_card_shows_labels_and_devices_as_they_are():
    how = {"device": HOSTILE, "dtype": "float32", "batch_size": 1, "seq_length": 8}
    check = {"rows": 1, "bytes": 1, "max_abs_difference": 0.0, "scores": {HOSTILE: 0.5}}
    check |= {"checked_against": "it", "speedup": 1.0, "speedup_spread": [1.0, 1.0]}
    sizes = EncoderConfig(8, 8, (1,), 8, (8,), pooler_size=0, num_labels=2)
    about = {"labels": [HOSTILE], "scores": {"validation": {HOSTILE: 0.5}}}
    text = model_card.text(sizes, about, {"": check | {"benchmark": how}})
    markup = markdown_it.MarkdownIt("commonmark").render(text)
    assert "<script>" not in markup and "<img" not in markup
    assert html.unescape(markup).count(HOSTILE) >= 3
    assert json.dumps(HOSTILE) in html.unescape(markup)


def test_attributes_are_escaped():
    table = tables.Table("<", ["x"], [["<i>"]])
    text = f"# {tables.escape(HOSTILE)}\n\n{table}\n\n![x](y)"
    chart = figures.Chart(HOSTILE, lambda axes: None, (), HOSTILE)
    found = check(html_lib.page(text, {"y": [chart]}))
    assert found.all("div")[0]["aria-label"] == HOSTILE
    assert found.all("img")[0]["alt"] == HOSTILE
    assert found.rows == [["x"], ["<i>"]]


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(hypothesis.strategies.text(st_characters, max_size=12))
def test_any_text_is_shown_as_it_is(foreign):
    """In a table, in a list and in a sentence, but for runs of spaces."""
    shown = " ".join(foreign.split())
    escaped = tables.escape(foreign)
    parts = [
        f"# Title {escaped}.",
        str(tables.Table("<>", ["a", foreign], [[foreign, "b"]])),
        f"- **b{escaped}** {escaped}",
        f"So {escaped}.",
    ]
    found = Page(html_lib.page("\n\n".join(parts), {}))
    assert found.rows == [["a", shown], [shown, "b"]]
    for text in (f"Title {shown}.", f"So {shown}.", f"b{shown} {shown}"):
        assert " ".join(text.split()) in " ".join(found.text.split())
    tags = {tag for tag, _ in found.tags}
    assert not tags & {"em", "a", "img", "code", "s", "script", "blockquote", "br"}


def test_only_our_own_markup_is_let_through():
    text = "# t\n\n<div onclick=x>\n\n<details>\n<summary><b>x</b></summary>\n\na <i>b"
    found = check(html_lib.page(text, {}))
    for markup in ("<div onclick=x>", "<summary><b>x</b></summary>", "a <i>b"):
        assert markup in found.text


# Several runs


def variant(seed=1, target=0.95, **changes):
    content = make_report() | {"seed": seed, "target_sparsity": target} | changes
    content["pruned"] = content["pruned"] | {"score": 0.8 + seed / 100}
    return content


def test_comparison_has_a_row_for_each_run_and_charts_for_each_task():
    runs = [("a", variant()), ("b", variant(target=0.6)), ("c", variant(task="mrpc"))]
    found = check(pages.compare_page(runs))
    head, *rows = found.rows
    assert head == compare.table(compare.points(runs)).head
    assert [row[0] for row in rows] == ["a", "b", "c"]
    assert rows[0][1:8] == [
        *("sst2", "accuracy", "0.9243", "0.8100", "-0.1143", "95.0 %", "12.3x")
    ]
    assert len(found.all("img")) == 2 * 5
    assert "mrpc: accuracy" in found.text and "sst2: accuracy" in found.text
    assert "Timed on NVIDIA H200, bfloat16" in found.text


def test_seeds_are_averaged():
    runs = [("a", variant(seed)) for seed in (1, 2, 3)]
    found = check(pages.compare_page(runs))
    config, *single = [row for row in found.rows if row[0] == "a"]
    # 0.81, 0.82 and 0.83
    assert config[:8] == [
        *("a", "sst2", "accuracy", "0.9243 ± 0.0000", "0.8200 ± 0.0100", "-0.1043"),
        *("95.0 %", "12.3x ± 0.0x"),
    ]
    assert config[8:10] == ["95.0 %", "1, 2, 3"]
    assert [row[4] for row in single] == ["0.8100", "0.8200", "0.8300"]
    assert len(found.all("img")) == 5


def test_speedups_of_different_devices_are_not_compared_in_silence():
    other = variant()
    other["benchmark"] = other["benchmark"] | {"device": "cpu"}
    found = check(pages.compare_page([("a", variant()), ("b", other)]))
    assert "not all timed in the same way" in found.text


def test_many_configs_are_spread_over_several_heat_maps():
    runs = [(f"run{n}", variant(target=0.5 + n / 100)) for n in range(9)]
    found = check(pages.compare_page(runs))
    assert len(found.all("img")) == 2 + 2 * 3


# The command


def save(folder, content):
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(content))
    return str(folder)


def run(*arguments):
    return pages.main(["page.py", *map(str, arguments)])


def test_command_writes_its_files_and_writes_them_again(tmp_path, capsys):
    first = save(tmp_path / "sst2-0.95-seed1", variant(1))
    second = save(tmp_path / "sst2-0.95-seed2", variant(2))
    to = tmp_path / "new" / "folder"
    assert run(first, second, "--to", to) == 0
    names = ["compare.html", "structures.png", "tradeoff.png"]
    assert sorted(path.name for path in to.iterdir()) == names
    assert (to / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    found = check((to / "compare.html").read_text())
    assert "sst2-0.95-seed" not in found.text  # they are seeds of one config
    (to / "notes.txt").write_text("mine")
    (to / "tradeoff.png").write_bytes(b"")
    assert run(first, "--to", to) == 0
    assert (to / "tradeoff.png").stat().st_size > 5000
    assert (to / "notes.txt").read_text() == "mine"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("runs", "names"),
    [  # folder, seed, target
        ([("x-seed1", 1), ("x-seed2", 2)], ["x", "x"]),
        ([("x-seed1", 1), ("x-seed2", 1)], ["x-seed1", "x-seed2"]),
        ([("x-seed1", 1), ("x-seed2", 2, 0.6)], ["x-seed1", "x-seed2"]),
        ([("x", 3), ("x-seed1", 1)], ["x", "x-seed1"]),
        ([("a/x", 1), ("b/x", 1)], ["a/x", "b/x"]),
        ([("a/x", 1), ("b/x", 2)], ["a/x", "b/x"]),
        ([("a/x-seed1", 1), ("b/x-seed2", 2)], ["a/x", "b/x"]),
        ([("m/a/x", 1), ("n/a/x", 2), ("y", 3)], ["m/a/x", "n/a/x", None]),
    ],
)
def test_only_seeds_of_one_config_share_a_name(runs, names, tmp_path):
    for folder, *content in runs:
        save(tmp_path / folder, variant(*content))
    found = [n for n, _ in pages.load_runs([tmp_path / run[0] for run in runs])]
    assert all(b in (a, None) for a, b in zip(found, names, strict=True))


@pytest.mark.parametrize("name", ["compare.html", "tradeoff.png", "structures.png"])
def test_files_of_others_are_not_overwritten(name, tmp_path, capsys):
    source = save(tmp_path / "run", variant())
    to = tmp_path / "to"
    to.mkdir()
    (to / name).write_text("mine")
    assert run(source, "--to", to) == 2
    assert name in capsys.readouterr().err
    assert [path.name for path in to.iterdir()] == [name]
    assert (to / name).read_text() == "mine"


BAD = {
    "no folder": (["{top}/none"], ["RUN='{top}/none'", "not a folder"]),
    "a file": (["{top}/file"], ["RUN='{top}/file'", "not a folder"]),
    "nothing there": (["{top}/empty"], ["no report.json", "nothing"]),
    "something else": (["{top}/other"], ["no report.json", "sweep.json, table.md"]),
    "cut off": (["{top}/cut"], ["cut/report.json", "damaged"]),
    "not text": (["{top}/binary"], ["binary/report.json", "damaged"]),
    "a list": (["{top}/list"], ["list/report.json", "not the report of a run"]),
    "no params": (["{top}/part"], ["part/report.json", "'params'"]),
    "no seed": (["{top}/seedless"], ["seedless/report.json", "'seed'"]),
    "no score": (["{top}/null"], ["null/report.json", "not the report of a run"]),
    "twice": (["{top}/run", "{top}/run"], ["twice"]),
    "twice, spelt anew": (["{top}/run", "{top}/run/../run/."], ["twice"]),
    "twice by a link": (["{top}/run", "{top}/link"], ["twice"]),
    "no run": ([], ["RUN", "usage"]),
    "no target": (["{top}/run", None], ["--to", "usage"]),
    "flag": (["{top}/run", "--from=x"], ["--from", "usage"]),
    "onto a file": (["{top}/run", "--to={top}/file"], ["--to='{top}/file'"]),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_said_in_one_line(case, tmp_path, capsys):
    for name in ("empty", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "other" / "table.md").write_text("x")
    (tmp_path / "other" / "sweep.json").write_text("{}")
    save(tmp_path / "run", variant())
    (tmp_path / "link").symlink_to(tmp_path / "run")
    part = variant()
    del part["params"]
    save(tmp_path / "part", part)
    seedless = variant()
    del seedless["seed"]
    save(tmp_path / "seedless", seedless)
    save(tmp_path / "null", variant() | {"pruned": {"score": None}})
    save(tmp_path / "list", [1])
    save(tmp_path / "cut", {})
    (tmp_path / "cut" / "report.json").write_text(json.dumps(variant())[:100])
    save(tmp_path / "binary", {})
    (tmp_path / "binary" / "report.json").write_bytes(b"\xff\xfe\x00")
    arguments, fragments = BAD[case]
    known = [word.format(top=tmp_path) for word in arguments if word]
    if None not in arguments and "onto" not in case:
        known += ["--to", str(tmp_path / "to")]
    assert run(*known) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: ") and out == ""
    for fragment in fragments:
        assert fragment.format(top=tmp_path) in line
    assert not (tmp_path / "to").exists()
    assert (tmp_path / "file").read_text() == "x"


def leaves(content, path=()):
    """The path of every value within a report that is no object."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from leaves(value, (*path, key))
    else:
        yield path


WRONG = [
    "null",
    '"x"',
    "[]",
    "{}",
    "NaN",
    "-Infinity",
    "1e999",
    "1" + 400 * "0",
    "true",
]
WRONG += [
    '["x", "y", "z", "w"]',
    "[[1], [2], [3], [4]]",
    '"\\ud800"',
    2000 * "[" + 2000 * "]",
]


@pytest.mark.parametrize("path", list(leaves(variant())), ids=".".join)
def test_damage_of_any_field_is_said_in_one_line_or_does_no_harm(
    path, tmp_path, capsys
):
    folder = pathlib.Path(save(tmp_path / "run", variant()))
    drawn = False
    for wrong in WRONG:
        content = variant()
        inner = content
        for key in path[:-1]:
            inner[key] = inner = dict(inner[key])
        inner[path[-1]] = "HERE"
        text = json.dumps(content).replace('"HERE"', wrong)
        (folder / "report.json").write_text(text)
        try:
            reports = pages.load_runs([folder])
        except UserError as error:
            assert "report.json" in str(error) and "\n" not in str(error)
            continue
        finally:
            assert capsys.readouterr().err == ""
        tables.table(reports[0][1])
        if not drawn:  # one page, for it takes long
            check(pages.compare_page(reports))
            drawn = True


def test_no_flipped_or_missing_byte_is_a_traceback(tmp_path):
    folder = pathlib.Path(save(tmp_path / "run", variant()))
    path = folder / "report.json"
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 3):
        flipped = whole[:place] + bytes([whole[place] ^ 0x04]) + whole[place + 1 :]
        for damaged in (whole[:place], flipped):
            path.write_bytes(damaged)
            try:
                pages.load_runs([folder])
            except UserError as error:
                assert str(error).startswith("RUN=") and "\n" not in str(error)
                refused += 1
    assert refused > len(whole) / 3


def test_process_exits_with_2_and_one_line(tmp_path):
    command = [sys.executable, "-m", "cofi_jax.report", str(tmp_path), "--to", "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: RUN=") and done.stderr.count("\n") == 1
