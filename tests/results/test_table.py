"""Result tables: their numbers in every format."""

import csv
import io
import json

import pytest
from rich.console import Console

from sslrun.claims.verdict import Inequality
from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.results.address import MEAN, Column, Labels, Row, place_parts
from sslrun.results.compare import compare
from sslrun.results.formats import Formats, table_formats, to_csv, to_latex, to_markdown
from sslrun.results.published import Number, Published
from sslrun.results.table import Table

FEW, ALL = Column("digits", Labels(0.1)), Column("digits", Labels(1.0))
MAE = {"name": "mae", "unit": "eV", "better": "lower", "digits": 3}


@pytest.fixture
def records(planted):
    return [
        planted("A & B", 90.0),
        planted("A & B", 92.0, seed=1),
        planted("A & B", 50.04, protocol="knn", labels=0.1),
        planted("C", 50.0, protocol="knn", labels=0.1),
        planted("C", 60.0, protocol="knn"),
    ]


def printed(table, terminal=False, width=100):
    text = io.StringIO()
    Console(file=text, width=width, force_terminal=terminal).print(table.render())
    return text.getvalue()


def test_cells_hold_mean_and_sample_deviation_in_natural_order(records):
    table = Table.from_records(records, "t")
    assert table.rows == [Row("A & B", "knn"), Row("A & B", "finetune"), Row("C", "knn")]
    assert table.columns == [FEW, ALL]
    cell = table.cells[Row("A & B", "finetune"), ALL]
    assert (cell.mean, cell.deviation) == (91.0, pytest.approx(2**0.5))
    assert cell.text() == "91.0 ± 1.4"
    assert table.notes == ["test accuracy in %, mean ± standard deviation over 2 seeds"]


def test_a_later_record_of_the_same_seed_replaces_the_earlier_one(records, planted):
    table = Table.from_records([*records, planted("C", 70.0, protocol="knn")])
    assert table.cells[Row("C", "knn"), ALL].values == {"0": 70.0}


def test_unknown_protocols_come_last(planted):
    table = Table.from_records(
        [planted("A", 1.0, protocol="mine"), planted("A", 2.0, protocol="scratch")]
    )
    assert [row.protocol for row in table.rows] == ["scratch", "mine"]


def test_a_pipe_gets_no_escape_codes_and_a_terminal_bold(records):
    table = Table.from_records(records, "t")
    assert "\x1b" not in printed(table)
    assert "\x1b[1m" in printed(table, terminal=True)
    assert "91.0 ± 1.4" in printed(table)


def test_tables_are_written_as_markdown_latex_csv_and_json(records, tmp_path):
    table = Table.from_records(records, "t")
    markdown = to_markdown(table)
    assert "| A & B | knn | **50.0** |  |" in markdown
    assert "| C | knn | **50.0** | 60.0 |" in markdown  # equal as printed, so both are best
    latex = to_latex(table)
    assert "A \\& B & knn" in latex
    assert "91.0 $\\pm$ 1.4" in latex
    lines = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert [float(line["mean"]) for line in lines] == [50.04, 91.0, 50.0, 60.0]
    assert (lines[0]["labels"], lines[0]["per_class"], lines[0]["metric"]) == (
        "0.1",
        "False",
        "accuracy",
    )
    cell = json.loads(table.to_json())["cells"][1]
    assert cell["values"] == {"0": 90.0, "1": 92.0}
    address = {key: cell[key] for key in ("task", "labels", "per_class", "shift", "metric")}
    assert address == {
        "task": "digits",
        "labels": 1.0,
        "per_class": False,
        "shift": None,
        "metric": "accuracy",
    }
    for ending in table_formats:
        table.write(tmp_path / f"t{ending}")
        assert (tmp_path / f"t{ending}").read_text()
    with pytest.raises(
        UserError,
        match=r"t\.doc: tables are written to files that end in \.md, \.tex, \.csv or \.json",
    ):
        table.write(tmp_path / "t.doc")
    (tmp_path / "folder.md").mkdir()
    with pytest.raises(
        UserError, match=r"folder\.md: can't be written \(is a folder\); name another place$"
    ):
        table.write(tmp_path / "folder.md")


def test_another_format_is_one_function(records, tmp_path):
    formats = Formats("tables")

    @formats.register(".html")
    def to_html(table):
        return "".join(f"<td>{cell.text()}</td>" for cell in table.cells.values())

    table = Table.from_records(records)
    formats.write(tmp_path / "t.html", table)
    assert "<td>91.0 ± 1.4</td>" in (tmp_path / "t.html").read_text()
    assert formats.joined(".html", [table, table]) == "\n".join([to_html(table)] * 2)
    with pytest.raises(ValueError, match="registered twice"):
        formats.register(".html")(to_html)
    with pytest.raises(UserError, match=r"tables are written to files that end in \.html$"):
        formats.check(tmp_path / "t.md")


def test_wide_tables_wrap_columns_without_truncating_numbers(planted):
    table = Table.from_records(
        [planted("A", 10.0 + n, protocol="knn", labels=n / 10) for n in range(1, 11)]
    )
    assert len([line for line in printed(table).splitlines() if line.startswith("A ")]) == 1
    lines = printed(table, width=40).splitlines()
    assert max(map(len, lines)) <= 40
    rows = [line.split()[1:] for line in lines if line.startswith("A ")]
    assert len(rows) > 1
    assert [float(number) for row in rows for number in row] == [10.0 + n for n in range(1, 11)]
    assert "…" not in printed(table, width=10)


def test_if_lower_is_better_the_lowest_is_bold_and_the_header_says_so(planted):
    rows = {"A": 0.0314, "B": 0.0271, "C": 0.2}
    table = Table.from_records(
        [planted(row, value, task="qm9", metric=MAE) for row, value in rows.items()], "t"
    )
    markdown = to_markdown(table)
    assert "|  | 100 % ↓ |" in markdown
    assert "| B | **0.027** |" in markdown
    assert "| A | 0.031 |" in markdown
    assert table.notes == ["test mae in eV (lower is better), seed 0 alone"]
    assert "100 \\% $\\downarrow$" in to_latex(table)
    metric = json.loads(table.to_json())["columns"][0]["metric"]
    assert (metric["unit"], metric["better"]) == ("eV", "lower")


def test_each_metric_has_its_own_digits_unit_and_direction(planted):
    records = [
        planted(row, value, task="qm9", metric=MAE) for row, value in (("A", 0.0314), ("B", 0.0271))
    ]
    records += [planted("A", 90.0), planted("B", 80.0)]
    markdown = to_markdown(Table.from_records(records))
    assert "|  | qm9 mae (eV) ↓ | digits accuracy |" in markdown
    assert "| A | 0.031 | **90.0** |" in markdown
    assert "| B | **0.027** | 80.0 |" in markdown
    assert (
        "test each task's own metric (qm9: mae in eV (lower is better); "
        "digits: accuracy in %), seed 0" in markdown
    )


HARD = "a · b: c, d"


def test_a_shift_may_have_any_name(planted, tmp_path):
    records = [
        planted(row, value, shifts={HARD: value - 10, "fog": value - 30}, seed=seed)
        for seed in (0, 1, 2)
        for row, value in (("A", 90.0 + seed), ("B", 80.0 + seed**2))
    ]
    table = Table.from_records(records, "t")
    hard, mean = (Column("digits", Labels(1.0), shift) for shift in (HARD, MEAN))
    assert [column.shift for column in table.columns] == [None, HARD, "fog", MEAN]
    assert table.cells[Row("A", "finetune"), mean].values["0"] == 70.0
    assert f"|  | ID | {HARD} | fog | mean OOD |" in to_markdown(table)
    (cell,) = [
        cell
        for cell in json.loads(table.to_json())["cells"]
        if (cell["row"], cell["shift"]) == ("B", HARD)
    ]
    assert cell["values"] == {"0": 70.0, "1": 71.0, "2": 74.0}
    lines = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert {line["shift"] for line in lines} == {"", HARD, "fog", "mean OOD"}
    again = Table("again")
    again.add_cells(json.loads(table.to_json()))
    assert again.cells == table.cells
    assert [column.metric for column in again.columns] == [Metric("accuracy")] * 4
    # A comparison matches only the published column of that name.
    numbers = {"A": {HARD: Number(50.0, None, True), "digits": Number(51.0, None, True)}}
    pairs = compare(table, Published("small", "someone2020", "Table 1", "%", numbers)).pairs
    assert {(pair.column.shift, pair.value) for pair in pairs} == {(HARD, 50.0), (None, 51.0)}
    # A claim names the cell by its components.
    places = {place_parts(place): place for place in table.cells}
    a, b = (places[row, "finetune", "digits", "100 %", HARD] for row in "AB")
    assert a == (Row("A", "finetune"), hard)
    inequality = Inequality(a, b)
    assert inequality.judge(table).difference == pytest.approx(81 - 215 / 3)
    assert inequality.text().startswith(f"A · finetune · digits · 100 % · {HARD} > B")
