"""Tables: the numbers in them, in every format."""

import csv
import io
import json

import pytest
from rich.console import Console

from sslrun.errors import UserError
from sslrun.results.table import Table


def result(row, protocol, labels, value, seed=0, task="digits"):
    return {"row": row, "recipe": "r", "backbone": "b", "pretext": "p", "task": task, "protocol": protocol,
            "labels": labels, "seed": seed, "metric": "accuracy", "metrics": {"test": {"accuracy": value}}}  # fmt: skip


RESULTS = [
    result("A & B", "finetune", 1.0, 90.0),
    result("A & B", "finetune", 1.0, 92.0, seed=1),
    result("A & B", "knn", 0.1, 50.04),
    result("C", "knn", 0.1, 50.0),
    result("C", "knn", 1.0, 60.0),
]


def printed(table, terminal=False, width=100):
    text = io.StringIO()
    Console(file=text, width=width, force_terminal=terminal).print(table.render())
    return text.getvalue()


def test_cells_hold_mean_and_sample_deviation_in_natural_order():
    table = Table.from_results(RESULTS, "t")
    assert table.rows == [("A & B", "knn"), ("A & B", "finetune"), ("C", "knn")]
    assert table.columns == [("digits", "10 %"), ("digits", "100 %")]
    cell = table.cells[("A & B", "finetune"), ("digits", "100 %")]
    assert (cell.mean, cell.deviation) == (91.0, pytest.approx(2**0.5))
    assert cell.text() == "91.0 ± 1.4"


def test_a_later_result_of_the_same_seed_takes_the_earlier_ones_place():
    table = Table.from_results([*RESULTS, result("C", "knn", 1.0, 70.0)])
    assert table.cells[("C", "knn"), ("digits", "100 %")].values == {"0": 70.0}


def test_a_pipe_gets_no_escape_codes_and_a_terminal_bold():
    table = Table.from_results(RESULTS, "t")
    assert "\x1b" not in printed(table)
    assert "\x1b[1m" in printed(table, terminal=True)
    assert "91.0 ± 1.4" in printed(table)


def test_markdown_latex_csv_json(tmp_path):
    table = Table.from_results(RESULTS, "t")
    markdown = table.to_markdown()
    assert "| A & B | knn | **50.0** |  |" in markdown
    assert "| C | knn | **50.0** | 60.0 |" in markdown  # equal as printed: both best
    latex = table.to_latex()
    assert "A \\& B & knn" in latex
    assert "91.0 $\\pm$ 1.4" in latex
    lines = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert [float(line["mean"]) for line in lines] == [50.04, 91.0, 50.0, 60.0]
    assert json.loads(table.to_json())["cells"][1]["values"] == {"0": 90.0, "1": 92.0}
    for suffix in ("md", "tex", "csv", "json"):
        table.write(tmp_path / f"t.{suffix}")
        assert (tmp_path / f"t.{suffix}").read_text()
    with pytest.raises(UserError, match=r"\.md"):
        table.write(tmp_path / "t.doc")
    (tmp_path / "folder.md").mkdir()
    with pytest.raises(UserError, match=r"folder\.md: can't be written \(Is a directory\); name another place$"):
        table.write(tmp_path / "folder.md")


def test_what_does_not_fit_the_terminal_goes_below_and_no_number_is_cut():
    table = Table.from_results([result("A", "knn", labels / 10, 10.0 + labels) for labels in range(1, 11)])
    assert len([line for line in printed(table).splitlines() if line.startswith("A ")]) == 1
    lines = printed(table, width=40).splitlines()
    assert max(map(len, lines)) <= 40
    told = [line.split()[1:] for line in lines if line.startswith("A ")]
    assert len(told) > 1
    assert [float(each) for line in told for each in line] == [10.0 + labels for labels in range(1, 11)]
    assert "…" not in printed(table, width=10)
