"""Published tables: complete, with sources, under their short names."""

import json
import os
import re
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from sslrun.cli import app
from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.results.address import Column, Labels, Row
from sslrun.results.compare import compare, compare_all
from sslrun.results.formats import table_formats
from sslrun.results.published import names, published, published_as, short_names
from sslrun.results.settings import ALWAYS, KINDS
from sslrun.results.table import Table

EVIDENCE = {
    "paper_text",
    "official_repo",
    "paper_text_translation",
    "secondary_quote",
    "lecture",
    "memory",
}


def own():
    return yaml.safe_load((files("sslrun.results") / "published.yaml").read_text(encoding="utf-8"))


def test_published_numbers_equal_those_of_their_collection():
    data = os.environ.get("SSLRUN_DATA")
    collection = Path(data).parent / "published.yaml" if data else None
    if collection is None or not collection.is_file():
        pytest.skip("the collection of published numbers is not beside SSLRUN_DATA")
    ours = own()
    for name, table in yaml.safe_load(collection.read_text(encoding="utf-8")).items():
        assert {key: ours[name][key] for key in table} == table, name


def test_every_number_has_a_source_and_a_verification_status():
    count = 0
    for name in names():
        table = published(name)
        assert re.search(r"[A-Za-z]{3}", table.paper), name
        assert table.where, name
        assert set(table.setting) <= {*KINDS, "source"}, name
        for cells in table.rows.values():
            for column, number in cells.items():
                count += 1
                where = (name, column)
                assert isinstance(number.value, int | float), where
                assert number.evidence in EVIDENCE, where
                assert isinstance(number.verified, bool), where
                assert not (number.verified and number.evidence == "memory"), where
    assert count == 1008


@pytest.mark.parametrize(
    ("short", "table", "rows", "columns", "row", "column", "value"),
    [
        ("vit", "vit_table2", 8, 6, "TPUv3-core-days", "Ours-JFT (ViT-L/16)", 680),
        ("bert-ablation", "bert_table5", 4, 5, "BERT_BASE", "SQuAD (F1)", 88.5),
        ("bert-size", "bert_table6", 6, 4, "24/1024/16", "MNLI-m (Acc)", 86.6),
        ("bert-ner", "bert_table7", 11, 2, "Concat Last Four Hidden", "Dev F1", 96.1),
        ("bert-masking", "bert_table8", 6, 3, "80/10/10", "NER feature-based", 94.9),
        ("lpft", "kumar_table1_id", 3, 8, "LP-FT", "CIFAR-10", 97.5),
        ("lpft", "kumar_table2_ood", 3, 12, "LP", "STL", 85.1),
        ("rotnet", "rotnet_table3_cifar10", 10, 1, "RotNet + conv", "CIFAR-10 acc", 91.16),
        (
            "simclr",
            "simclr_cifar10_b9",
            3,
            1,
            "SimCLR ResNet-50 (bs 1024)",
            "CIFAR-10 linear acc",
            94.0,
        ),
        ("mae", "mae_table3", 5, 4, "MAE", "ViT-L", 85.9),
        ("dino", "dino_table2", 25, 2, "DINO ViT-S/16", "k-NN", 74.5),
        ("doersch", "doersch_table1_voc07_det", 12, 1, "Ours-color-dropping", "mAP", 46.3),
    ],
)
def test_tables_have_short_names(short, table, rows, columns, row, column, value):
    (source,) = [candidate for candidate in published_as(short) if candidate.name == table]
    assert len(source.rows) == rows
    assert len({name for cells in source.rows.values() for name in cells}) == columns
    assert source.rows[row][column].value == value


def test_the_vit_table_is_five_models_by_seven_sets_and_their_cost():
    table = published("vit_table2").rows
    models = [name for name in table["TPUv3-core-days"] if "re-fine-tune" not in name]
    assert len(models) == 5
    assert len(table) == 8
    assert all(set(models[:4]) <= set(cells) for cells in table.values())


def test_unknown_table_names_are_a_one_line_error():
    assert not set(short_names()) & set(names())
    assert [table.name for table in published_as("bert_table5")] == ["bert_table5"]
    for wrong, near in (
        ("vitt", "vit"),
        ("bert-ablations", "bert-ablation"),
        ("bert_tabel5", "bert_table5"),
    ):
        with pytest.raises(UserError, match=f"no such published table: '{wrong}'.*'{near}"):
            published_as(wrong)
    with pytest.raises(UserError, match=r"There is: vit, .*see `sslrun show table`") as error:
        published_as("nothing of the kind")
    assert "\n" not in str(error.value)


def test_tables_are_shown_with_their_settings():
    shown = CliRunner().invoke(app, ["show", "table", "bert_table5"]).output
    assert "steps: 1000000" in shown
    assert "epochs: not reported" in shown
    assert (
        "kumar2022lpft, Table 1 (ID): 24 numbers, 6 recalled"
        in CliRunner().invoke(app, ["show", "table", "lpft"]).output
    )


def test_every_number_is_shown_as_published():
    shown = CliRunner().invoke(app, ["show", "table", "lpft"]).output
    lines = shown[shown.index("kumar_table2_ood, %") :].splitlines()
    assert lines[2].split()[:3] == ["STL", "CIFAR-10.1", "Ent-30"]
    assert lines[5].startswith("LP-FT  90.7 ± 0.3  93.5 ± 0.1")
    assert "71.6 †" in lines[5]
    assert "† recalled from the paper, not seen in it" in lines
    assert "LP-FT, Average (6 datasets, submission text): Table 2 (OOD), pre-camera-ready" in shown
    for name in names():
        shown = json.loads(CliRunner().invoke(app, ["show", "table", name, "--json"]).output)[
            "tables"
        ]
        numbers = {row: {column: number["value"] for column, number in cells.items()}
                   for row, cells in shown[name]["rows"].items()}  # fmt: skip
        assert numbers == {
            row: {column: number.value for column, number in cells.items()}
            for row, cells in published(name).rows.items()
        }


def ours(task, rows):
    table = Table("mine")
    for row, value in rows.items():
        table.add(Row(row, "lpft"), Column(task, Labels(1.0), None, Metric("accuracy")), value)
    return table


def test_only_tables_of_a_paper_that_share_a_cell_are_shown(tmp_path):
    comparisons = compare_all(ours("CIFAR-10", {"x": 90.0}), published_as("lpft"))
    assert [table.against for table in comparisons.tables] == ["kumar_table1_id"]
    assert (
        "none of our cells matches: Table 2 (OOD) (kumar_table2_ood)"
        in comparisons.tables[0].notes[-1]
    )
    (nothing,) = compare_all(ours("nothing", {"x": 90.0}), published_as("lpft")).tables
    assert not nothing.pairs
    assert nothing.notes[-1].startswith("none of our cells matches: ")
    assert nothing.notes[-1].count("(kumar_") == len(published_as("lpft")) - 1
    both = ours("CIFAR-10", {"x": 90.0})
    both.add(Row("x", "lpft"), Column("CIFAR-10", Labels(1.0), "STL-10", Metric("accuracy")), 80.0)
    for ending in table_formats:
        compare_all(both, published_as("lpft")).write(tmp_path / f"t{ending}")
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "table",
        "kumar_table1_id",
        "kumar_table2_ood",
    ]
    assert "90.7" in (tmp_path / "t.md").read_text()


def test_settings_missing_from_the_source_are_reported_as_unknown():
    comparison = compare(ours("ImageNet", {"Ours-JFT (ViT-L/16)": 50.0}), published("vit_table2"))
    assert {"steps", "parameters", "data"} <= {
        setting.kind for setting in comparison.settings if setting.verdict == "unknown"
    }
    assert "steps: unknown (ours: unknown; published: unknown)" in comparison.preface
    assert set(ALWAYS) <= {setting.kind for setting in comparison.settings}
