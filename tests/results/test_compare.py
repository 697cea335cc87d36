"""Comparison of our table with a published one: matching, settings, rank agreement."""

import csv
import io
import json
import math
from dataclasses import replace

import pytest
import yaml
from rich.console import Console

from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.results.address import Column, Labels, Row
from sslrun.results.agreement import agreement
from sslrun.results.compare import compare
from sslrun.results.formats import table_formats, to_csv, to_latex, to_markdown
from sslrun.results.matching import check_stand_ins, normal
from sslrun.results.published import Number, Published, names, published
from sslrun.results.record import RunRecord
from sslrun.results.settings import Setting, facts
from sslrun.results.table import Table

BERT = {"BERT": 60.0, "no nsp": 61.0, "LTR & No NSP": 55.0, "+ BiLSTM": 54.0}


F1 = {"name": "f1"}
ACCURACY = Metric("accuracy")


@pytest.fixture
def result(planted):
    def build(row, value, **more):
        return planted(row, value, **{"task": "MNLI", "backbone": "bert", "pretext": "mlm", **more})

    return build


@pytest.fixture
def bert(result):
    def build(**more):
        records = [
            result(row, value + seed, seed=seed, **more)
            for row, value in BERT.items()
            for seed in (0, 1)
        ]
        return Table.from_records(records, "mine")

    return build


def render(table):
    text = io.StringIO()
    Console(file=text, width=160).print(table.render())
    return text.getvalue()


def small_table(unit="%", **more):
    """Return a published table with tasks as rows and methods as columns."""
    rows = {
        "CIFAR-10": {"A": Number(90, None, True), "B": Number(80, 0.5, True)},
        "STL-10": {"A": Number(70, None, False)},
    }
    return Published("small", "someone2020", "Table 1", unit, rows, **more)


def test_rows_and_columns_match_by_name_and_alias(bert):
    comparison = compare(bert(), published("bert_table5"))
    assert [(pair.published_row, pair.published_column) for pair in comparison.pairs] == [
        (row, "MNLI-m (Acc)")
        for row in ("BERT_BASE", "No NSP", "LTR & No NSP", "LTR & No NSP + BiLSTM")
    ]
    assert [pair.difference for pair in comparison.pairs] == pytest.approx(
        [60.5 - 84.4, 61.5 - 83.9, 55.5 - 82.1, 54.5 - 82.1]
    )
    assert comparison.unmatched == {
        "published columns": ["QNLI (Acc)", "MRPC (Acc)", "SST-2 (Acc)", "SQuAD (F1)"]
    }
    assert normal("MNLI-m (Acc)") == normal("mnli M acc") != normal("MNLI-mm (Acc)")
    assert normal("75 %") != normal("75")


def test_tables_of_tasks_by_methods_are_transposed_and_protocols_match_by_alias(result):
    transposed = compare(
        Table.from_records([result("a", 95.0, task="cifar10"), result("c", 1.0, task="cifar10")]),
        small_table(),
    )
    assert [(pair.row.name, pair.value) for pair in transposed.pairs] == [("a", 90)]
    assert transposed.unmatched["rows of ours"] == ["c · finetune"]
    assert transposed.unmatched["published columns"] == ["STL-10"]
    results = [
        result("moco", 90.0, task="cifar10", protocol=protocol)
        for protocol in ("probe", "finetune", "lpft", "knn")
    ]
    by_protocol = compare(Table.from_records(results), published("kumar_table1_id"))
    assert [(pair.row.protocol, pair.published_row) for pair in by_protocol.pairs] == [
        ("probe", "LP"),
        ("finetune", "FT"),
        ("lpft", "LP-FT"),
    ]
    assert "90% CI half-width" in render(by_protocol)
    assert "protocol" not in {protocol.kind for protocol in by_protocol.settings}


def test_a_stand_in_is_compared_with_its_column_and_declared(result):
    rows = [result(row, value, task=task, labels=labels) for row, value in BERT.items()
            for task, labels in (("entailment", 1.0), ("span", 0.3), ("MNLI", 1.0))]  # fmt: skip
    ours = Table.from_records(rows, "mine")
    assert {pair.column.task for pair in compare(ours, published("bert_table5")).pairs} == {"MNLI"}
    ours.stand_ins = {
        "bert_table5": {"entailment": "QNLI", "span": "SQuAD (F1)"},
        "another": {"MNLI": "MRPC"},
    }
    comparison = compare(ours, published("bert_table5"))
    assert {pair.column: pair.published_column for pair in comparison.pairs} == {
        Column("entailment", Labels(1.0)): "QNLI (Acc)", Column("span", Labels(0.3)): "SQuAD (F1)",
        Column("MNLI", Labels(1.0)): "MNLI-m (Acc)",
    }  # fmt: skip
    output = render(comparison)
    assert (
        "stand-ins: entailment for QNLI (Acc); span for SQuAD (F1): "
        "tasks of the same kind on other data" in output
    )
    assert "NOT a replication" in output
    assert not comparison.same
    assert (
        "test data: differs (ours: entailment, span; published: QNLI (Acc), SQuAD (F1))" in output
    )


def test_stand_ins_replace_test_splits_and_shifts_match_by_name(
    result,
):
    shifts = {"STL-10": 60.0, "fog": 50.0}
    ours = Table.from_records(
        [
            result("x", 70.0, task="digits", protocol="lpft", labels=labels, shifts=shifts)
            for labels in (0.1, 1.0)
        ]
    )
    ours.stand_ins = {
        name: {"digits": "CIFAR-10"} for name in ("kumar_table1_id", "kumar_table2_ood")
    }
    in_distribution, shifted = (
        compare(ours, published(name)) for name in ("kumar_table1_id", "kumar_table2_ood")
    )
    assert [(pair.column.label, pair.ours.mean, pair.value) for pair in in_distribution.pairs] == [
        ("100 %", 70.0, 97.5)
    ]
    assert {(pair.column.label, pair.published_column) for pair in shifted.pairs} == {
        ("100 % · STL-10", "STL")
    }
    ours = Table.from_records(
        [result("A", 70.0, task="digits", labels=labels) for labels in (0.1, 1.0)]
    )
    ours.stand_ins = {"small": {"digits": "CIFAR-10"}}
    assert "stand-ins: digits for CIFAR-10: tasks of the same kind" in render(
        compare(ours, small_table())
    )


def test_columns_that_are_protocols_match_our_protocols(result):
    results = [
        result("SimCLR", value, task="imagenet-1k", protocol=protocol)
        for protocol, value in (("knn", 50.0), ("probe", 60.0), ("finetune", 70.0))
    ]
    comparison = compare(Table.from_records(results), published("dino_table2"))
    assert [(pair.row.protocol, pair.published_row, pair.value) for pair in comparison.pairs] == [
        ("knn", "SimCLR RN50 · k-NN", 60.7),
        ("probe", "SimCLR RN50 · linear", 69.1),
    ]
    assert "protocol" not in {setting.kind for setting in comparison.settings}
    assert not compare(
        Table.from_records([result("SimCLR", 9.0, task="cifar10")]), published("dino_table2")
    ).pairs


@pytest.mark.parametrize(("task", "labels"), [("STL", 0.1), ("cifar", 0.1)])
def test_a_label_fraction_is_not_part_of_a_name(task, labels, result):
    # The column 'STL' with 10 % of the labels must not match 'STL-10'.
    comparison = compare(
        Table.from_records([result("A", 95.0, task=task, labels=labels)]), small_table()
    )
    assert not comparison.pairs
    assert "None of our cells" in render(comparison)
    assert json.loads(comparison.to_json())["cells"] == []


def test_a_shifted_split_is_not_the_test_split():
    ours = Table("t")
    ours.add(Row("x", "lpft"), Column("CIFAR-10", Labels(1.0), "CIFAR-10.1", ACCURACY), 70.0)
    assert not compare(ours, published("kumar_table1_id")).pairs
    assert [pair.value for pair in compare(ours, published("kumar_table2_ood")).pairs] == [93.5]


def test_cells_measured_as_in_the_source_are_preferred(result):
    results = [
        result(
            row,
            40.0 + number,
            task="cifar10",
            protocol=protocol,
            labels=labels,
            facts={"epochs": 4.0, "data": None},
        )
        for number, row in enumerate(("SimCLR", "BYOL", "VICReg"))
        for protocol in ("knn", "probe")
        for labels in (0.1, 1.0)
    ]
    comparison = compare(Table.from_records(results), published("solo_learn_resnet18_1000ep"))
    assert {(pair.row.protocol, pair.column.label) for pair in comparison.pairs} == {
        ("probe", "100 %")
    }
    assert "SimCLR · knn" in comparison.unmatched["rows of ours"]
    assert "epochs: differs (ours: 4; published: 1,000)" in comparison.preface
    assert "protocol: the same (probe)" in comparison.preface
    # If no cell fits, all are compared and the preface reports the difference.
    knn_only = compare(
        Table.from_records([record for record in results if record.protocol == "knn"]),
        published("solo_learn_resnet18_1000ep"),
    )
    assert len(knn_only.pairs) == 3
    assert "protocol: differs (ours: knn; published: probe)" in knn_only.preface


def test_a_fact_unknown_for_one_row_makes_the_verdict_unknown(result):
    full_facts = {"data": "Wikipedia + BookCorpus", "steps": 1_000_000, "parameters": 110e6}
    records = [
        result("BERT", 60.0, facts=full_facts),
        result("no nsp", 61.0, facts={}),
    ]  # the second row's weights come from a file
    comparison = compare(Table.from_records(records), published("bert_table5"))
    assert {
        setting.kind: setting.verdict
        for setting in comparison.settings
        if setting.kind in full_facts
    } == dict.fromkeys(full_facts, "unknown")
    assert "steps: unknown (ours: 1,000,000, unknown; published: 1,000,000)" in comparison.preface
    records[1] = result("no nsp", 61.0, pretext=None)  # nothing was pretrained
    comparison = compare(Table.from_records(records), published("bert_table5"))
    assert {
        setting.kind: setting.verdict
        for setting in comparison.settings
        if setting.kind in full_facts
    } == dict.fromkeys(full_facts, "same")


def test_units_are_converted_or_their_cells_skipped(result):
    ours = Table.from_records([result("A", 95.0, task="cifar10")])
    assert compare(ours, small_table("% error")).pairs[0].value == 10
    assert compare(ours, small_table("fraction")).pairs[0].value == 9000
    assert not compare(ours, small_table("eV MAE")).pairs
    assert "published in eV MAE" in render(compare(ours, small_table("eV MAE")))
    tags = Table.from_records([result("80/10/10", 95.0, task="NER feature-based", metric=F1)])
    assert [pair.value for pair in compare(tags, published("bert_table8")).pairs] == [
        94.9
    ]  # F1 is in percent
    hours = Table.from_records([result("A", 95.0, task="cifar10")])
    hours.add_cost(
        Row("A", "finetune"), Column("compute", metric=Metric("STL-10", "hours", "lower")), 3.0, "0"
    )
    assert len(compare(hours, small_table()).pairs) == 1
    cost = Table.from_records([result("Ours-JFT (ViT-H/14)", 3.0, task="TPUv3-core-days")])
    assert compare(cost, published("vit_table2")).unmatched["cells in other units"]


def test_rank_agreement_is_kendalls_tau_b_with_its_exact_p(bert, result):
    assert agreement([1, 2], [1, 2]) is None
    perfect = agreement([1.0, 2.0, 3.0], [10.0, 20.0, 30.0])
    assert (perfect.tau, perfect.p, perfect.exact) == (1.0, pytest.approx(2 / 6), True)
    # One inversion in six pairs: tau = 2/3. On each side, 1 + 3 of 24 orders are as extreme.
    assert agreement([1, 2, 3, 4], [1, 2, 4, 3]).p == pytest.approx(8 / 24)
    # One tie: tau-b is at most 5 / sqrt(5 * 6). Two of the 24 orders reach it, and two its
    # negative.
    tied = agreement([1, 2, 2, 4], [1, 2, 3, 4])
    assert (tied.tau, tied.p, tied.exact) == (
        pytest.approx(5 / math.sqrt(30)),
        pytest.approx(4 / 24),
        True,
    )
    assert math.isnan(agreement([1, 1, 1], [1, 2, 3]).tau)
    assert not agreement([1, 1, *range(2, 9)], range(9)).exact
    comparison = compare(bert(), published("bert_table5"))
    (rank_agreement,) = comparison.agreements.values()
    # Ours: No NSP > BERT > LTR > BiLSTM; published: BERT > No NSP > LTR = BiLSTM. Four
    # concordant pairs, one discordant, one tie.
    assert (rank_agreement.tau, rank_agreement.rows) == (
        pytest.approx((4 - 1) / math.sqrt(5 * 6)),
        4,
    )
    assert "no rank agreement" in render(
        compare(Table.from_records([result("A", 9.0, task="cifar10")]), small_table())
    )


def test_ranks_are_compared_within_a_protocol(result):
    results = [result(row, value - 30 * (protocol == "knn"), protocol=protocol)
               for row, value in BERT.items() for protocol in ("knn", "finetune")]  # fmt: skip
    comparison = compare(Table.from_records(results), replace(published("bert_table5"), setting={}))
    assert [
        (group, rank_agreement.rows) for (group, _), rank_agreement in comparison.agreements.items()
    ] == [
        ("knn", 4),
        ("finetune", 4),
    ]


def test_differences_in_settings_come_first(bert, result):
    source = published("bert_table5")
    assert compare(bert(), source).preface[0].startswith("Not known to be a replication")
    differing = compare(
        bert(facts={"data": "text8", "steps": 1000, "parameters": 11_000_000}), source
    )
    assert differing.preface[0].startswith("NOT a replication of devlin2019bert, Table 5")
    assert "Not the same: data, steps, parameters." in differing.preface[0]
    assert "steps: differs (ours: 1,000; published: 1,000,000)" in differing.preface
    for text in (
        render(differing),
        to_markdown(differing),
        to_latex(differing),
        differing.to_json(),
    ):
        assert "NOT a replication" in text
    (first, *_) = csv.DictReader(io.StringIO(to_csv(differing)))
    assert (first["same_data"], float(first["mean"]), float(first["difference"])) == (
        "differs",
        60.5,
        pytest.approx(-23.9),
    )
    setting = {
        "data": "d",
        "steps": 5,
        "parameters": 1000,
        "backbone": "BERT",
        "labels": "100%",
        "protocol": "finetune",
        "metric": "accuracy",
    }
    same = compare(
        Table.from_records(
            [result("A", 95.0, task="cifar10", facts={"data": "D", "steps": 5, "parameters": 1001})]
        ),
        small_table(setting=setting),
    )
    assert same.same
    assert "replication" not in same.preface[0]
    assert Setting("steps", (7800,), ("20 epochs",)).verdict == "unknown"
    # A network of the same name at another width is not known to be the same.
    assert Setting("backbone", ("resnet18 (channels 16)",), ("ResNet-18",)).verdict == "unknown"
    assert Setting("backbone", ("resnet18",), ("ResNet-18",)).verdict == "same"
    assert Setting("backbone", ("resnet50",), ("ResNet-18",)).verdict == "differs"
    assert Setting("steps", (7800, 7801), (7800,)).verdict == "differs"
    # A published setting that differs by row may equal ours; data only if it is listed.
    assert Setting("backbone", ("vit-base",), ("by row",)).verdict == "unknown"
    assert Setting("data", ("ImageNet",), ("by row: ImageNet, JFT-300M",)).verdict == "unknown"
    assert Setting("data", ("cifar10",), ("by row: ImageNet, JFT-300M",)).verdict == "differs"


def test_facts_are_read_from_a_runs_folder_and_its_pretraining(tmp_path):
    run = tmp_path / "probe-1"
    (tmp_path / "pretrain-abc").mkdir()
    run.mkdir()
    (tmp_path / "pretrain-abc" / "result.json").write_text(
        json.dumps({"steps": 7, "parameters": 9})
    )
    (run / "identity.json").write_text(
        json.dumps(
            {"origin": {"pretrain": "abc"}, "backbone": {"name": "resnet18", "channels": 16}}
        )
    )
    (run / "recipe.yaml").write_text(
        yaml.safe_dump({"data": {"name": "digits"}, "pretrain": {"epochs": 2}})
    )
    assert facts(RunRecord(run)) == {
        "backbone": "resnet18 (channels 16)",
        "data": "digits",
        "epochs": 2,
        "steps": 7,
        "parameters": 9,
    }
    assert facts(RunRecord(tmp_path)) == {}
    (run / "identity.json").write_text(
        json.dumps(
            {"backbone": {"name": "hf", "model": "some/encoder", "component.files": ["abc"]}}
        )
    )
    assert facts(RunRecord(run)) == {"backbone": "hf (model some/encoder)"}


def test_every_published_table_can_be_compared_with_itself():
    for name in names():
        source = published(name)
        ours = Table("itself")
        for row, cells in source.rows.items():
            for column, number in cells.items():
                ours.add(
                    Row(row, "finetune"), Column(column, Labels(1.0), None, ACCURACY), number.value
                )
        render(compare(ours, source))
        columns = {name for cells in source.rows.values() for name in cells}
        assert set(source.aliases) <= {*source.rows, *columns, source.task}


def test_a_comparison_is_written_in_every_table_format(tmp_path, bert):
    comparison = compare(bert(), published("bert_table5"))
    for ending in table_formats:
        comparison.write(tmp_path / f"t{ending}")
    assert "| BERT | ours | 60.5 ± 0.7 |" in to_markdown(comparison)
    assert "|  | difference | -23.9 |" in to_markdown(comparison)
    assert "60.5 $\\pm$ 0.7" in to_latex(comparison)


def test_for_metrics_where_lower_is_better_a_gain_is_a_negative_difference(result):
    mae = {"name": "mae", "unit": "eV", "better": "lower", "digits": 3}
    ours = Table.from_records(
        [
            result(row, value, task="qm9", metric=mae)
            for row, value in (("A", 0.03), ("B", 0.05), ("C", 0.07))
        ]
    )
    rows = {
        row: {"QM9": Number(value, None, True)}
        for row, value in (("A", 0.04), ("B", 0.04), ("C", 0.06))
    }
    comparison = compare(ours, Published("small", "someone2020", "Table 1", "eV MAE", rows))
    assert [pair.gain for pair in comparison.pairs] == pytest.approx([0.01, -0.01, -0.01])
    assert "| A | ours | 0.030 |" in to_markdown(comparison)
    assert "|  | difference | -0.010 |" in to_markdown(comparison)
    assert "lower is better, and a negative difference an improvement: mae" in comparison.notes
    (rank_agreement,) = comparison.agreements.values()
    assert rank_agreement.tau == pytest.approx(2 / math.sqrt(2 * 3))
    error_rate = {"name": "error", "better": "lower"}
    errors = Table.from_records([result("A", 4.0, task="cifar10", metric=error_rate)])
    assert not compare(errors, small_table()).pairs  # error rates do not match accuracies
    assert compare(errors, small_table("% error")).pairs[0].value == 90


def test_a_task_may_stand_in_for_a_published_row_of_tasks():
    figure = published("dino_fig4_attention_jaccard_voc12")  # backbones in rows, methods in columns
    check_stand_ins({"stamps": "ViT-S/16"}, ["stamps"], [figure])
    with pytest.raises(UserError, match="there is no column 'ViT-S/14'"):
        check_stand_ins({"stamps": "ViT-S/14"}, ["stamps"], [figure])
