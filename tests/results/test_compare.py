"""Our table beside a published one."""

import csv
import io
import json
import math
from dataclasses import replace

import pytest
import yaml
from rich.console import Console

from sslrun.metric import Metric
from sslrun.results.address import Column, Labels, Row
from sslrun.results.agreement import agreement
from sslrun.results.compare import compare
from sslrun.results.formats import table_formats, to_csv, to_latex, to_markdown
from sslrun.results.matching import normal
from sslrun.results.published import Number, Published, names, published
from sslrun.results.record import RunRecord
from sslrun.results.settings import Setting, facts
from sslrun.results.table import Table

BERT = {"BERT": 60.0, "no nsp": 61.0, "LTR & No NSP": 55.0, "+ BiLSTM": 54.0}


F1 = {"name": "f1"}
ACCURACY = Metric("accuracy")


@pytest.fixture
def result(planted):
    def plant(row, value, **more):
        return planted(row, value, **{"task": "MNLI", "backbone": "bert", "pretext": "mlm", **more})

    return plant


@pytest.fixture
def bert(result):
    def table(**more):
        records = [
            result(row, value + seed, seed=seed, **more)
            for row, value in BERT.items()
            for seed in (0, 1)
        ]
        return Table.from_records(records, "mine")

    return table


def printed(table):
    text = io.StringIO()
    Console(file=text, width=160).print(table.render())
    return text.getvalue()


def small(unit="%", **more):
    """Rows are tasks, columns methods."""
    rows = {
        "CIFAR-10": {"A": Number(90, None, True), "B": Number(80, 0.5, True)},
        "STL-10": {"A": Number(70, None, False)},
    }
    return Published("small", "someone2020", "Table 1", unit, rows, **more)


def test_rows_and_columns_find_each_other_by_name_and_alias(bert):
    made = compare(bert(), published("bert_table5"))
    assert [(pair.published_row, pair.published_column) for pair in made.pairs] == [
        (row, "MNLI-m (Acc)")
        for row in ("BERT_BASE", "No NSP", "LTR & No NSP", "LTR & No NSP + BiLSTM")
    ]
    assert [pair.difference for pair in made.pairs] == pytest.approx(
        [60.5 - 84.4, 61.5 - 83.9, 55.5 - 82.1, 54.5 - 82.1]
    )
    assert made.unmatched == {
        "published columns": ["QNLI (Acc)", "MRPC (Acc)", "SST-2 (Acc)", "SQuAD (F1)"]
    }
    assert normal("MNLI-m (Acc)") == normal("mnli M acc") != normal("MNLI-mm (Acc)")
    assert normal("75 %") != normal("75")


def test_a_table_of_tasks_by_methods_is_turned_and_protocols_have_the_papers_names(result):
    turned = compare(
        Table.from_records([result("a", 95.0, task="cifar10"), result("c", 1.0, task="cifar10")]),
        small(),
    )
    assert [(pair.row.name, pair.value) for pair in turned.pairs] == [("a", 90)]
    assert turned.unmatched["rows of ours"] == ["c · finetune"]
    assert turned.unmatched["published columns"] == ["STL-10"]
    results = [
        result("moco", 90.0, task="cifar10", protocol=each)
        for each in ("probe", "finetune", "lpft", "knn")
    ]
    kumar = compare(Table.from_records(results), published("kumar_table1_id"))
    assert [(pair.row.protocol, pair.published_row) for pair in kumar.pairs] == [("probe", "LP"), ("finetune", "FT"), ("lpft", "LP-FT")]  # fmt: skip
    assert "90% CI half-width" in printed(kumar)
    assert "protocol" not in {each.kind for each in kumar.settings}


def test_a_stand_in_stands_beside_the_column_it_names_and_says_that_it_is_one(result):
    rows = [result(row, value, task=task, labels=labels) for row, value in BERT.items()
            for task, labels in (("entailment", 1.0), ("span", 0.3), ("MNLI", 1.0))]  # fmt: skip
    ours = Table.from_records(rows, "mine")
    assert {pair.column.task for pair in compare(ours, published("bert_table5")).pairs} == {"MNLI"}
    ours.stand_ins = {
        "bert_table5": {"entailment": "QNLI", "span": "SQuAD (F1)"},
        "another": {"MNLI": "MRPC"},
    }
    made = compare(ours, published("bert_table5"))
    assert {pair.column: pair.published_column for pair in made.pairs} == {
        Column("entailment", Labels(1.0)): "QNLI (Acc)", Column("span", Labels(0.3)): "SQuAD (F1)",
        Column("MNLI", Labels(1.0)): "MNLI-m (Acc)",
    }  # fmt: skip
    told = printed(made)
    assert (
        "stand-ins: entailment for QNLI (Acc); span for SQuAD (F1): tasks of the same kind on other data"
        in told
    )
    assert "NOT a replication" in told
    assert not made.same
    assert "test data: differs (ours: entailment, span; published: QNLI (Acc), SQuAD (F1))" in told


def test_only_the_test_of_a_task_stands_in_for_a_column_and_its_shifts_go_by_their_own_names(
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
    id_, ood = (compare(ours, published(name)) for name in ("kumar_table1_id", "kumar_table2_ood"))
    assert [(pair.column.label, pair.ours.mean, pair.value) for pair in id_.pairs] == [
        ("100 %", 70.0, 97.5)
    ]
    assert {(pair.column.label, pair.published_column) for pair in ood.pairs} == {
        ("100 % · STL-10", "STL")
    }
    ours = Table.from_records(
        [result("A", 70.0, task="digits", labels=labels) for labels in (0.1, 1.0)]
    )
    ours.stand_ins = {"small": {"digits": "CIFAR-10"}}
    assert "stand-ins: digits for CIFAR-10: tasks of the same kind" in printed(
        compare(ours, small())
    )


def test_where_the_columns_are_protocols_ours_stand_beside_them(result):
    results = [result("SimCLR", value, task="imagenet-1k", protocol=protocol)
               for protocol, value in (("knn", 50.0), ("probe", 60.0), ("finetune", 70.0))]  # fmt: skip
    made = compare(Table.from_records(results), published("dino_table2"))
    assert [(pair.row.protocol, pair.published_row, pair.value) for pair in made.pairs] == [
        ("knn", "SimCLR RN50 · k-NN", 60.7),
        ("probe", "SimCLR RN50 · linear", 69.1),
    ]
    assert "protocol" not in {each.kind for each in made.settings}
    assert not compare(
        Table.from_records([result("SimCLR", 9.0, task="cifar10")]), published("dino_table2")
    ).pairs


@pytest.mark.parametrize(("task", "labels"), [("STL", 0.1), ("cifar", 0.1)])
def test_a_share_of_labels_is_no_part_of_a_name(task, labels, result):
    # 'STL' with 10 % of the labels is not 'STL-10'.
    made = compare(Table.from_records([result("A", 95.0, task=task, labels=labels)]), small())
    assert not made.pairs
    assert "None of our cells" in printed(made)
    assert json.loads(made.to_json())["cells"] == []


def test_a_shifted_split_is_not_the_test_split():
    ours = Table("t")
    ours.add(Row("x", "lpft"), Column("CIFAR-10", Labels(1.0), "CIFAR-10.1", ACCURACY), 70.0)
    assert not compare(ours, published("kumar_table1_id")).pairs
    assert [pair.value for pair in compare(ours, published("kumar_table2_ood")).pairs] == [93.5]


def test_only_what_was_measured_as_the_source_says_stands_beside_it(result):
    results = [result(row, 40.0 + at, task="cifar10", protocol=protocol, labels=labels, facts={"epochs": 4.0, "data": None})
               for at, row in enumerate(("SimCLR", "BYOL", "VICReg"))
               for protocol in ("knn", "probe") for labels in (0.1, 1.0)]  # fmt: skip
    made = compare(Table.from_records(results), published("solo_learn_resnet18_1000ep"))
    assert {(pair.row.protocol, pair.column.label) for pair in made.pairs} == {("probe", "100 %")}
    assert "SimCLR · knn" in made.unmatched["rows of ours"]
    assert "epochs: differs (ours: 4; published: 1,000)" in made.preface
    assert "protocol: the same (probe)" in made.preface
    # Where none was, all stand there, and that is said.
    only = compare(Table.from_records([each for each in results if each.protocol == "knn"]), published("solo_learn_resnet18_1000ep"))  # fmt: skip
    assert len(only.pairs) == 3
    assert "protocol: differs (ours: knn; published: probe)" in only.preface


def test_what_one_row_does_not_tell_is_not_the_same_as_what_another_does(result):
    told = {"data": "Wikipedia + BookCorpus", "steps": 1_000_000, "parameters": 110e6}
    both = [
        result("BERT", 60.0, facts=told),
        result("no nsp", 61.0, facts={}),
    ]  # the second from a file
    made = compare(Table.from_records(both), published("bert_table5"))
    assert {
        each.kind: each.verdict for each in made.settings if each.kind in told
    } == dict.fromkeys(told, "unknown")
    assert "steps: unknown (ours: 1,000,000, unknown; published: 1,000,000)" in made.preface
    both[1] = result("no nsp", 61.0, pretext=None)  # nothing was pretrained
    made = compare(Table.from_records(both), published("bert_table5"))
    assert {
        each.kind: each.verdict for each in made.settings if each.kind in told
    } == dict.fromkeys(told, "same")


def test_units_are_brought_together_or_left_out(result):
    ours = Table.from_records([result("A", 95.0, task="cifar10")])
    assert compare(ours, small("% error")).pairs[0].value == 10
    assert compare(ours, small("fraction")).pairs[0].value == 9000
    assert not compare(ours, small("eV MAE")).pairs
    assert "published in eV MAE" in printed(compare(ours, small("eV MAE")))
    tags = Table.from_records([result("80/10/10", 95.0, task="NER feature-based", metric=F1)])
    assert [pair.value for pair in compare(tags, published("bert_table8")).pairs] == [
        94.9
    ]  # F1 is in percent
    hours = Table.from_records([result("A", 95.0, task="cifar10")])
    hours.add_cost(
        Row("A", "finetune"), Column("compute", metric=Metric("STL-10", "hours", "lower")), 3.0, "0"
    )
    assert len(compare(hours, small()).pairs) == 1
    cost = Table.from_records([result("Ours-JFT (ViT-H/14)", 3.0, task="TPUv3-core-days")])
    assert compare(cost, published("vit_table2")).unmatched["cells in other units"]


def test_rank_agreement_is_kendalls_tau_b_with_its_exact_p(bert, result):
    assert agreement([1, 2], [1, 2]) is None
    three = agreement([1.0, 2.0, 3.0], [10.0, 20.0, 30.0])
    assert (three.tau, three.p, three.exact) == (1.0, pytest.approx(2 / 6), True)
    # One inversion of six pairs: tau 2/3; 1 + 3 of 24 orders are as far out, on each side.
    assert agreement([1, 2, 3, 4], [1, 2, 4, 3]).p == pytest.approx(8 / 24)
    # One tie: tau-b = 5 / sqrt(5 * 6), its largest; of the 24 orders two reach it, and two its
    # opposite.
    tied = agreement([1, 2, 2, 4], [1, 2, 3, 4])
    assert (tied.tau, tied.p, tied.exact) == (
        pytest.approx(5 / math.sqrt(30)),
        pytest.approx(4 / 24),
        True,
    )
    assert math.isnan(agreement([1, 1, 1], [1, 2, 3]).tau)
    assert not agreement([1, 1, *range(2, 9)], range(9)).exact
    made = compare(bert(), published("bert_table5"))
    (found,) = made.agreements.values()
    # Ours: No NSP > BERT > LTR > BiLSTM; published: BERT > No NSP > LTR = BiLSTM. Four pairs with,
    # one against, one tie.
    assert (found.tau, found.rows) == (pytest.approx((4 - 1) / math.sqrt(5 * 6)), 4)
    assert "no rank agreement" in printed(
        compare(Table.from_records([result("A", 9.0, task="cifar10")]), small())
    )


def test_ranks_are_compared_within_a_protocol(result):
    results = [result(row, value - 30 * (protocol == "knn"), protocol=protocol)
               for row, value in BERT.items() for protocol in ("knn", "finetune")]  # fmt: skip
    made = compare(Table.from_records(results), replace(published("bert_table5"), setting={}))
    assert [(group, each.rows) for (group, _), each in made.agreements.items()] == [
        ("knn", 4),
        ("finetune", 4),
    ]


def test_what_was_not_the_same_is_said_first(bert, result):
    source = published("bert_table5")
    assert compare(bert(), source).preface[0].startswith("Not known to be a replication")
    differing = compare(
        bert(facts={"data": "text8", "steps": 1000, "parameters": 11_000_000}), source
    )
    assert differing.preface[0].startswith("NOT a replication of devlin2019bert, Table 5")
    assert "Not the same: data, steps, parameters." in differing.preface[0]
    assert "steps: differs (ours: 1,000; published: 1,000,000)" in differing.preface
    for text in (
        printed(differing),
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
    told = {"data": "d", "steps": 5, "parameters": 1000, "backbone": "BERT", "labels": "100%", "protocol": "finetune",
            "metric": "accuracy"}  # fmt: skip
    same = compare(Table.from_records([result("A", 95.0, task="cifar10", facts={"data": "D", "steps": 5, "parameters": 1001})]), small(setting=told))  # fmt: skip
    assert same.same
    assert "replication" not in same.preface[0]
    assert Setting("steps", (7800,), ("20 epochs",)).verdict == "unknown"
    # A network of the same name at a quarter of its width is not known to be the same.
    assert Setting("backbone", ("resnet18 (channels 16)",), ("ResNet-18",)).verdict == "unknown"
    assert Setting("backbone", ("resnet18",), ("ResNet-18",)).verdict == "same"
    assert Setting("backbone", ("resnet50",), ("ResNet-18",)).verdict == "differs"
    assert Setting("steps", (7800, 7801), (7800,)).verdict == "differs"
    # What differs within the published table may be ours; of data only if it is listed.
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


def test_every_published_table_stands_beside_any_other():
    for name in names():
        known = published(name)
        ours = Table("itself")
        for row, cells in known.rows.items():
            for column, number in cells.items():
                ours.add(
                    Row(row, "finetune"), Column(column, Labels(1.0), None, ACCURACY), number.value
                )
        printed(compare(ours, known))
        columns = {name for cells in known.rows.values() for name in cells}
        assert set(known.aliases) <= {*known.rows, *columns, known.task}


def test_the_same_renderers_write_it(tmp_path, bert):
    made = compare(bert(), published("bert_table5"))
    for ending in table_formats:
        made.write(tmp_path / f"t{ending}")
    assert "| BERT | ours | 60.5 ± 0.7 |" in to_markdown(made)
    assert "|  | difference | -23.9 |" in to_markdown(made)
    assert "60.5 $\\pm$ 0.7" in to_latex(made)


def test_where_lower_is_better_a_gain_is_a_negative_difference(result):
    mae = {"name": "mae", "unit": "eV", "better": "lower", "digits": 3}
    ours = Table.from_records([result(row, value, task="qm9", metric=mae) for row, value in (("A", 0.03), ("B", 0.05), ("C", 0.07))])  # fmt: skip
    rows = {
        row: {"QM9": Number(value, None, True)}
        for row, value in (("A", 0.04), ("B", 0.04), ("C", 0.06))
    }
    made = compare(ours, Published("small", "someone2020", "Table 1", "eV MAE", rows))
    assert [pair.gain for pair in made.pairs] == pytest.approx([0.01, -0.01, -0.01])
    assert "| A | ours | 0.030 |" in to_markdown(made)
    assert "|  | difference | -0.010 |" in to_markdown(made)
    assert "lower is better, and a negative difference an improvement: mae" in made.notes
    (agreed,) = made.agreements.values()
    assert agreed.tau == pytest.approx(2 / math.sqrt(2 * 3))
    percent = {"name": "error", "better": "lower"}
    errors = Table.from_records([result("A", 4.0, task="cifar10", metric=percent)])
    assert not compare(errors, small()).pairs  # accuracies are no errors
    assert compare(errors, small("% error")).pairs[0].value == 90
