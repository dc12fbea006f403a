"""The page of one run and of several: its contents, what it loads, what it escapes, and runs that it refuses."""

import json
import re
from html.parser import HTMLParser

import pytest
from runs import facts, logs, proposal, write_run

from hf_dis.errors import DataError
from hf_dis.report.command import make_report
from hf_dis.report.figures import INTERVALS, thinned
from hf_dis.report.records import read_run

HOSTILE = "<script>alert('x')</script>"
# Attributes by which a page loads something, or sends the reader elsewhere.
LOADING = {"src", "srcset", "href", "xlink:href", "data", "action", "poster", "background"}


class Tags(HTMLParser):
    """Collects tags with their attributes, and ids."""

    def __init__(self):
        super().__init__()
        self.tags, self.ids = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]


def parsed(page):
    tags = Tags()
    tags.feed(page)
    return tags


def report(*folders, tmp_path):
    return make_report(folders, tmp_path / "page.html").read_text()


def test_the_page_loads_nothing(tmp_path):
    page = report(write_run(tmp_path / "a"), write_run(tmp_path / "b"), tmp_path=tmp_path)
    tags = parsed(page)
    for _, attributes in tags.tags:
        for name in LOADING & attributes.keys():
            assert attributes[name].startswith(("#", "data:")), attributes
    assert not re.search(r"url\((?!#)|@import|https?://", page)
    assert {tag for tag, _ in tags.tags}.isdisjoint({"iframe", "img", "object", "embed", "base", "form"})
    assert "default-src 'none'" in page
    assert len(tags.ids) == len(set(tags.ids))


def test_what_a_user_named_is_escaped(tmp_path):
    hostile = {**facts(), "command": f"python {HOSTILE}", "device": HOSTILE, "student": HOSTILE, "task": HOSTILE}
    hostile["method"] = {HOSTILE: HOSTILE}
    run = write_run(tmp_path / "a", facts=hostile, logs=[*logs(), {f"eval_{HOSTILE}": HOSTILE, "step": 9}])
    folder = (tmp_path / "a").rename(tmp_path / "a<img src=x onerror=alert(1)>$x_1$")
    page = report(folder, write_run(tmp_path / "b", facts=hostile), tmp_path=tmp_path)
    assert run and HOSTILE not in page and "<img" not in page
    assert page.count("&lt;script&gt;") >= 6 and [tag for tag, _ in parsed(page).tags].count("script") == 1


def test_runs_side_by_side_have_a_curve_each(tmp_path):
    page = report(write_run(tmp_path / "a"), write_run(tmp_path / "b", last=0.25), tmp_path=tmp_path)
    assert "Training loss: kd_loss" in page and "Training loss: ce_loss" in page
    (legend,) = re.findall(r"Training loss: kd_loss</h3>\s*<div class=\"legend\">(.*?)</div>", page)
    assert re.findall(r"</i>(.*?)</span>", legend) == ["a", "b"]
    assert "<td><code>kd_loss</code></td><td>0.5</td><td>4</td><td>0.25</td><td>4</td>" in page
    assert page.count('class="command"') == 2


def test_runs_of_the_same_name_are_told_apart_by_their_folders(tmp_path):
    folders = [write_run(tmp_path / one / "out") for one in ("a", "b")]
    page = report(*folders, tmp_path=tmp_path)
    assert all(f"<strong>{folder}</strong>" in page for folder in folders)


@pytest.mark.parametrize("other", [{"task": "causal language model"}, {"num_classes": 41}], ids=["task", "classes"])
def test_runs_of_different_tasks_are_refused(tmp_path, other):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", facts=facts() | other)]
    with pytest.raises(DataError, match=r"a distils a classification with 40 classes, b distils .* make a report of"):
        report(*folders, tmp_path=tmp_path)


def test_a_single_run_has_its_page_beside_the_records(tmp_path):
    folder = write_run(tmp_path / "a")
    assert make_report([folder]) == make_report([folder / "report"]) == folder / "report" / "report.html"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "has logged no value"),
        ("[1]\n", "line 1 of .* is not a record of a report"),
        ('{"kind": "other"}\n', "line 1 of .* is not a record of a report"),
        ("{]\n", "line 1 of .* is not a record"),
        ('{"kind": "log", "time": "x", "step": 1}\n', "record 1 of the run a is damaged"),
        ("\xff", "cannot be read: .*; restore or delete the file"),
        ("[" * 100_000 + "\n", "line 1 of .* is not a record"),
        ('{"kind": "log", "time": "x", "step": 1e400, "values": {}}\n', "record 1 of the run a is damaged"),
    ],
    ids=["empty", "no object", "kind", "no JSON", "part missing", "no text", "too deep", "infinite step"],
)
def test_damaged_records_are_refused(tmp_path, content, told):
    folder = write_run(tmp_path / "a")
    (folder / "report" / "records.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=told):
        read_run(folder)


@pytest.mark.parametrize(
    "wrong", [{"num_classes": "many"}, {"versions": "2.13"}, {"max_steps": None}, {"method": [1]}]
)
def test_facts_of_a_different_kind_are_refused(tmp_path, wrong):
    (name,) = wrong
    with pytest.raises(DataError, match=f"record 1 of the run a is damaged: .*{name} is .*; restore or delete it"):
        read_run(write_run(tmp_path / "a", facts=facts() | wrong))
    with pytest.raises(DataError, match="record 1 of the run b is damaged"):
        read_run(write_run(tmp_path / "b", facts={one: value for one, value in facts().items() if one != name}))


@pytest.mark.parametrize("wrong", [{"edges": None}, {"edges": "x"}, {"measured": [1.0]}, {"step": "</script>"}])
def test_snapshots_that_are_not_densities_are_refused(tmp_path, wrong):
    with pytest.raises(DataError, match="record 5 of the run a is damaged"):
        read_run(write_run(tmp_path / "a", proposals=[proposal(1) | wrong]))


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(DataError, match="is not a folder: give the output_dir"):
        read_run(tmp_path / "absent")
    with pytest.raises(DataError, match=r"has no report/records.jsonl"):
        read_run(tmp_path)


def test_values_that_are_not_finite_leave_a_gap(tmp_path):
    broken = [*logs(), {"loss": 1.0, "kd_loss": float("nan"), "step": 5}, {"loss": 1.0, "kd_loss": 1e400, "step": 6}]
    page = report(write_run(tmp_path / "a", logs=broken), tmp_path=tmp_path)
    assert "kd_loss is inf: training has diverged" in page and "Training loss" in page


def test_a_log_that_is_cut_short_does_not_count(tmp_path):
    folder = write_run(tmp_path / "a")
    with (folder / "report" / "records.jsonl").open("a") as file:
        file.write('{"kind": "log", "step": 99')
    assert read_run(folder).last_step == 4


def test_a_long_run_has_a_small_page(tmp_path):
    many = [{**logs()[0], "dis/ess": 10 + step % 7, "kd_loss": 1 / step, "step": step} for step in range(1, 20001)]
    folder = write_run(tmp_path / "a", logs=many, proposals=[proposal(step) for step in range(40)])
    assert len(report(folder, tmp_path=tmp_path)) < 1_500_000


def test_thinning_keeps_peaks_and_ends():
    points = [(step, 0.0) for step in range(10_000)]
    points[4321] = (4321, 9.0)
    points[4322] = (4322, -9.0)
    kept = thinned(points)
    assert {points[0], points[4321], points[4322], points[-1]} <= set(kept) and kept == sorted(kept)
    assert len(kept) <= 2 * INTERVALS + 2 and thinned(points[:100]) == points[:100]


def test_the_records_are_lines_of_json(tmp_path):
    lines = (write_run(tmp_path / "a") / "report" / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == [
        "run",
        "log",
        "log",
        "log",
        "proposal",
        "proposal",
        "seconds",
        "end",
    ]
