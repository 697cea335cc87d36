"""The report: what is on the page, what is escaped, and what is said about missing numbers."""

import re
import shutil

import pytest

from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.report import figures
from sslrun.report.build import CURVES, build, write_report
from sslrun.report.charts import POINTS, thin
from sslrun.report.collect import collect
from sslrun.report.figures import pareto
from sslrun.report.page import TextTable, render
from sslrun.results.table import Table

pytest.importorskip("matplotlib")


def page_of(root, looks=0):
    said = []
    report = build(collect([root], root), looks, ["sslrun", "report", "<script>"], said.append)
    return render(report), said


def test_every_text_is_escaped_and_the_only_script_is_the_pages_own(planted):
    page, _ = page_of(planted, looks=1)
    assert "<script>alert" not in page
    assert page.count("<script>") == 1
    assert page.count("&lt;script&gt;alert(1)") > 10
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "https://" not in page


def test_damaged_unfinished_and_older_runs_are_named(damaged):
    page, _ = page_of(damaged)
    problems = page[page.index('id="problems"') :]
    problems = problems[: problems.index("</section>")]
    assert "runs of several versions of sslrun: 0.0.9, 0.1.0" in problems
    assert re.search(r"first/probe-\w+: .*damaged", problems)
    assert re.search(r"second/pretrain-\w+: is not finished", problems)


def test_cells_carry_the_number_to_sort_by_and_rows_repeat_their_name(planted):
    material = collect([planted], planted)
    table = TextTable.of(material.tables[0])
    assert [len(line) for line in table.body] == [table.label_columns + 4] * 2
    assert table.body[0][0].text.startswith("first")
    first = table.body[0][table.label_columns]
    assert first.value == pytest.approx(81.25)
    assert first.best
    assert not table.body[1][table.label_columns].best


def test_evaluations_of_other_options_get_rows_of_their_own(planted, plant):
    other = plant(planted, "first", 0, temperature=0.5)
    folder = next(iter((planted / "first").glob("probe-*")))
    copy = shutil.copytree(folder, folder.with_name("probe-000000000000"))
    text = (copy / "identity.json").read_text()
    mine = re.search(r'"pretrain": "(\w+)"', text).group(1)
    (copy / "sums.json").unlink()
    (copy / "identity.json").write_text(text.replace(mine, other.hash))
    names = {row.name for row in Table.from_records(collect([planted], planted).evaluations).rows}
    assert any("pretext.temperature: 0.5" in name for name in names)
    assert any("pretext.temperature: default" in name for name in names)


def test_a_chart_of_many_rows_keeps_the_best_and_says_so(planted, monkeypatch):
    monkeypatch.setattr(figures, "LINES", 1)
    (table,) = collect([planted], planted).tables
    (chart,) = figures.label_efficiency(table)
    (line,) = chart.series
    assert line.name.startswith("first")
    assert chart.title.endswith("the best 1 of 2 rows")


def test_the_front_holds_what_no_cheaper_run_reaches():
    points = [(1, 50.0), (2, 40.0), (3, 60.0), (4, 60.0), (5, 61.0)]
    assert pareto(points, Metric("accuracy")) == [(1, 50.0), (3, 60.0), (5, 61.0)]
    assert pareto(points, Metric("mae", better="lower")) == [(1, 50.0), (2, 40.0)]


def test_long_curves_are_thinned_with_both_ends_kept():
    values = list(range(10 * POINTS))
    assert (thin(values)[0], thin(values)[-1], len(thin(values))) == (0, values[-1], POINTS)
    assert thin([1, 2]) == [1, 2]


def test_a_page_of_many_runs_stays_small_and_says_what_it_leaves_out(tmp_path, plant):
    for seed in range(CURVES + 10):
        plant(tmp_path, f"recipe{seed % 40}", seed, steps=2)
    page, _ = page_of(tmp_path)
    assert len(page) < 2_000_000
    assert f"the first 10 of {CURVES + 10} pretrainings are left out" in page


@pytest.mark.parametrize("name", ["nothing", "file.txt"])
def test_without_runs_the_report_says_what_to_do(tmp_path, name):
    target = tmp_path / name
    if name == "nothing":
        target.mkdir()
    with pytest.raises(UserError, match=r"no run there|no such folder"):
        write_report([target], tmp_path, tmp_path / "r.html", 0, [], print)
    assert not (tmp_path / "r.html").exists()
