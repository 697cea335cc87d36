"""Shifted test sets: every protocol scores them, and they never select a model."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from sslrun import cli
from sslrun.claims.run import Trial
from sslrun.claims.schema import load_claim
from sslrun.errors import UserError
from sslrun.protocols.finetune import Finetune
from sslrun.recipe import load
from sslrun.results.compare import compare_all
from sslrun.results.formats import to_markdown
from sslrun.results.published import published_as
from sslrun.results.record import RunRecord, find_records
from sslrun.results.table import Table
from sslrun.stages.bench import CellBench
from sslrun.stages.context import Context
from sslrun.stages.evaluate import cells
from sslrun.stages.sweep import work
from sslrun.training.device import compute
from sslrun.training.loop import NonFinite

RECIPE = {
    "name": "shifted",
    "backbone": {"name": "mlp", "width": 16, "depth": 1},
    "data": {"name": "digits", "size": 8},
    "finetune": {"epochs": 2, "batch": 32, "optimizer": "sgd", "lr": [0.01, 0.1], "keep": "best"},
    "evaluate": {
        "digits": {
            "protocols": [
                "knn",
                "probe",
                "fewshot",
                "finetune",
                "lpft",
                "scratch",
                "nearest-neighbors",
            ],
            "labels": [0.1],
            "fewshot": {"shots": [5]},
            "task": {"augmentation": {"crop": [0.8, 1.0]}},
        }
    },
}
SHIFTS = {
    "noise": {"corruption": "gaussian-noise", "severity": [1, 5]},
    "turned": {"corruption": "rotation", "severity": 5},
}

HARD = "a · b: c, d"
"""A shift's name with every separator that titles use."""

SWEEP = {"name": "swept", "seeds": [0, 1], "rows": {"MLP": {}}}
CLAIM = {
    "number": 1,
    "title": "A claim",
    "says": ["so"],
    "source": "a test",
    "otherwise": "else",
    "variants": {
        "small": {
            "minutes": 1,
            "sweep": "sweep.yaml",
            "inequalities": [
                {
                    "greater": ["MLP", "lpft", "digits", "10 %", "mean OOD"],
                    "lesser": ["MLP", "probe", "digits", "10 %", HARD],
                    "margin": -200,
                }
            ],
        }
    },
}


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: work this small waits longer for a second thread than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def evaluated(tmp_path):
    """Run the recipe with shifts and other changes; returns the result of each protocol."""

    def run(shifts=None, **changes):
        recipe = {**RECIPE, **changes}
        recipe["evaluate"] = {
            "digits": {**RECIPE["evaluate"]["digits"], **({"shifts": shifts} if shifts else {})}
        }
        path = tmp_path / "shifted.yaml"
        path.write_text(yaml.safe_dump(recipe))
        context = Context(tmp_path / "runs", compute("cpu"))
        every = cells(load(path), 0, tmp_path / "runs")
        return {cell.protocol: cell.execute(context) for cell in every}

    return run


def figures(result):
    """Return the part of a result that a shift must not change."""
    return {key: result.get(key) for key in ("metrics", "lr", "tried", "l2", "chosen")}


def test_every_protocol_scores_every_shift_without_changing_other_results(evaluated):
    plain, shifted = evaluated(), evaluated(SHIFTS)
    assert set(plain) == set(RECIPE["evaluate"]["digits"]["protocols"])
    for protocol, result in shifted.items():
        assert figures(result) == figures(plain[protocol])
        assert list(result["shifts"]) == ["noise", "turned"]
        assert "shifts" not in plain[protocol]
        assert 0 <= result["shifts"]["noise"]["accuracy"] <= 100
    assert (
        shifted["probe"]["shifts"]["turned"]["accuracy"]
        < shifted["probe"]["metrics"]["test"]["accuracy"]
    )
    again = evaluated(
        {
            "noise 1": {"corruption": "gaussian-noise", "severity": 1},
            "noise 5": {"corruption": "gaussian-noise", "severity": 5},
        }
    )
    for protocol, result in again.items():  # several severities report their mean
        mean = sum(value["accuracy"] for value in result["shifts"].values()) / 2
        assert shifted[protocol]["shifts"]["noise"]["accuracy"] == pytest.approx(mean)


def test_results_on_a_papers_sets_are_compared_with_its_numbers(evaluated, tmp_path):
    result = evaluated({"CIFAR-10.1": "fog", "STL-10": "contrast"})["lpft"]
    path = next(tmp_path.glob("runs/shifted/lpft-*/result.json"))
    path.with_name("sums.json").unlink()
    path.write_text(json.dumps({**result, "task": "cifar10"}))
    table = Table.from_records([RunRecord(path.parent)], "t")
    beside = compare_all(table, published_as("lpft"))
    pairs = {
        (pair.column.label, pair.published.value) for table in beside.tables for pair in table.pairs
    }
    assert pairs == {("10 %", 97.5), ("10 % · CIFAR-10.1", 93.5), ("10 % · STL-10", 90.7)}


def test_a_claim_names_a_shift_behind_the_share_of_labels(tmp_path):
    (tmp_path / "sweep.yaml").write_text(
        yaml.safe_dump(
            {
                **SWEEP,
                "base": {
                    **RECIPE,
                    "evaluate": {
                        "digits": {
                            **RECIPE["evaluate"]["digits"],
                            "shifts": {HARD: SHIFTS["noise"], "turned": SHIFTS["turned"]},
                        }
                    },
                },
            }
        )
    )
    path = tmp_path / "claim.yaml"
    path.write_text(yaml.safe_dump(CLAIM))
    trial = Trial.of_variant(load_claim(path), "small", tmp_path / "runs")
    assert {cell.protocol for _, cell in trial.plan.cells} == {"probe", "lpft"}
    work([trial.plan], Context(tmp_path / "runs", compute("cpu")))
    ((inequality, verdict, _),) = trial.judge().judged
    assert (
        inequality.text()
        == "MLP · lpft · digits · 10 % · mean OOD > MLP · probe · digits · 10 % · a · b: c, d - 200"
    )
    assert verdict.word == "supported"
    CLAIM["variants"]["small"]["inequalities"][0]["lesser"][-1] = "noize"
    path.write_text(yaml.safe_dump(CLAIM))
    with pytest.raises(
        UserError, match=r"no such cell of the table: 'MLP · probe · digits · 10 % · noize'"
    ):
        Trial.of_variant(load_claim(path), "small", tmp_path / "runs")


def test_labels_out_of_distribution_choose_nothing(evaluated, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    labels = np.arange(60) % 10
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    np.savez(
        tmp_path / "b.npz", x_train=images, y_train=labels, x_test=images, y_test=(labels + 3) % 10
    )
    a, b = (
        evaluated({"other": {"data": {"name": "npz", "path": str(tmp_path / f"{name}.npz")}}})
        for name in "ab"
    )
    for protocol in a:
        assert figures(a[protocol]) == figures(b[protocol])
    assert any(a[protocol]["shifts"] != b[protocol]["shifts"] for protocol in a)


def test_the_table_has_columns_for_each_shift_and_their_mean(evaluated, tmp_path):
    evaluated(SHIFTS)
    records = [record for record in find_records(tmp_path / "runs") if record.protocol != "fewshot"]
    table = Table.from_records(records, "t")
    probe = next(record for record in records if record.protocol == "probe")
    cells = {
        column.label: cell.mean
        for (row, column), cell in table.cells.items()
        if row.protocol == "probe"
    }
    noise, turned = (part["accuracy"] for part in probe.shifts.values())
    assert cells == {
        "10 %": probe.test["accuracy"],
        "10 % · noise": noise,
        "10 % · turned": turned,
        "10 % · mean OOD": pytest.approx((noise + turned) / 2),
    }
    head = next(line for line in to_markdown(table).splitlines() if line.startswith("|"))
    assert [part.strip() for part in head.split("|")[3:-1]] == ["ID", "noise", "turned", "mean OOD"]


def test_the_epoch_that_is_best_on_validation_is_kept(evaluated, monkeypatch):
    """Replace validation scores so that the second of four epochs is the best."""
    states, scores, honest = [], iter([30.0, 80.0, 80.0, 10.0]), CellBench.evaluate

    def scripted(self, learner, split):
        metrics = honest(self, learner, split)
        if learner.training or split != "val" or self.cell.protocol != "finetune":
            return metrics
        if (score := next(scores, None)) is None:
            return metrics
        states.append({name: tensor.clone() for name, tensor in learner.state_dict().items()})
        return {**metrics, "accuracy": score}

    monkeypatch.setattr(CellBench, "evaluate", scripted)
    kept = {}
    honest_test = Finetune.test

    def test(self, bench, learner):
        kept.update({name: tensor.clone() for name, tensor in learner.state_dict().items()})
        return honest_test(self, bench, learner)

    monkeypatch.setattr(Finetune, "test", test)
    digits = {**RECIPE["evaluate"]["digits"], "protocols": ["finetune"]}
    monkeypatch.setitem(RECIPE["evaluate"], "digits", digits)
    evaluated(finetune={**RECIPE["finetune"], "lr": 0.1, "epochs": 4})
    assert len(states) == 4
    same = [all(torch.equal(kept[name], state[name]) for name in kept) for state in states]
    assert same == [False, True, False, False]  # ties: the earlier epoch


def test_of_learning_rates_that_score_the_same_the_one_told_is_the_one_kept(
    evaluated, tmp_path, monkeypatch
):
    monkeypatch.setitem(
        RECIPE["evaluate"], "digits", {**RECIPE["evaluate"]["digits"], "protocols": ["finetune"]}
    )
    honest = CellBench.evaluate

    def even(self, learner, split):
        return {**honest(self, learner, split), "accuracy": 50.0}

    monkeypatch.setattr(CellBench, "evaluate", even)
    tied = evaluated(finetune={**RECIPE["finetune"], "lr": [0.001, 0.1]})["finetune"]
    alone = evaluated(finetune={**RECIPE["finetune"], "lr": tied["lr"]})["finetune"]
    assert tied["metrics"]["test"] == alone["metrics"]["test"]


def test_a_rate_at_which_training_diverges_is_no_candidate_and_where_all_do_that_is_told(
    evaluated, monkeypatch
):
    monkeypatch.setitem(
        RECIPE["evaluate"], "digits", {**RECIPE["evaluate"]["digits"], "protocols": ["finetune"]}
    )
    options = {**RECIPE["finetune"], "clip": None}
    tried = evaluated(finetune={**options, "lr": [1e30, 0.01]})["finetune"]
    alone = evaluated(finetune={**options, "lr": 0.01})["finetune"]
    assert (tried["lr"], tried["tried"]["1e+30"]) == (0.01, None)
    assert tried["metrics"] == alone["metrics"]
    with pytest.raises(NonFinite, match=r"is not finite at step .*Lower lr"):
        evaluated(finetune={**options, "lr": [1e30, 1e31]})


def test_a_run_that_is_killed_keeps_the_best_epoch_that_it_has_seen(
    evaluated, tmp_path, monkeypatch
):
    monkeypatch.setitem(
        RECIPE["evaluate"],
        "digits",
        {**RECIPE["evaluate"]["digits"], "protocols": ["finetune"], "labels": [0.3]},
    )
    changes = {
        "watch": {"checkpoint": 1e-9},
        "finetune": {**RECIPE["finetune"], "lr": [0.3, 1.0], "epochs": 4},
    }
    whole = evaluated(SHIFTS, **changes)["finetune"]
    shutil.rmtree(tmp_path / "runs")
    honest, looks = CellBench.keep_if_best, []

    def killed(self, learner, path):
        looks.append(path)
        if len(looks) in (3, 4, 7):  # before the evaluation is saved; the resumed run repeats it
            raise KeyboardInterrupt
        honest(self, learner, path)

    monkeypatch.setattr(CellBench, "keep_if_best", killed)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            evaluated(SHIFTS, **changes)
    resumed = evaluated(SHIFTS, **changes)["finetune"]
    assert figures(resumed) == figures(whole)
    assert resumed["shifts"] == whole["shifts"]
    assert resumed["distortion"] == whole["distortion"]


def test_distortion_is_zero_for_frozen_features_and_grows_with_changes(
    evaluated, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(
        RECIPE["evaluate"],
        "digits",
        {**RECIPE["evaluate"]["digits"], "protocols": ["probe", "finetune", "lpft"]},
    )
    fixed = {
        "epochs": 2,
        "batch": 32,
        "optimizer": "sgd",
        "frozen_norm": True,
    }  # otherwise its statistics would change
    still, far = (evaluated(SHIFTS, finetune={**fixed, "lr": lr}) for lr in (1e-9, 0.1))
    assert list(far["finetune"]["distortion"]) == ["ID", "noise", "turned"]
    assert (
        max(still["finetune"]["distortion"].values())
        < 1e-3
        < min(far["finetune"]["distortion"].values())
    )
    assert "distortion" not in far["probe"]
    assert (
        "distortion" in evaluated(finetune={**fixed, "lr": 0.1})["lpft"]
    )  # of every run, with or without shifts
    # The result is the score of the saved weights.
    (folder,) = (
        path.parent
        for path in (tmp_path / "runs/shifted").glob("finetune-*/result.json")
        if json.loads(path.read_text())["distortion"] == far["finetune"]["distortion"]
    )
    assert load_file(folder / "backbone.safetensors")
    monkeypatch.setattr(sys, "argv", ["sslrun", "table", str(folder), "--distortion", "--json"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 0
    table = json.loads(capsys.readouterr().out)
    assert {cell["shift"] or "ID": cell["mean"] for cell in table["cells"]} == far["finetune"][
        "distortion"
    ]
    assert {cell["labels"] for cell in table["cells"]} == {0.1}


@pytest.mark.parametrize(
    ("shifts", "words"),
    [
        ({"s": {"corruption": "fogg"}}, "Did you mean 'fog'?"),
        (
            {"s": {"corruption": "fog", "severity": 6}},
            "evaluate.digits.shifts.s.severity: should be less than or equal to 5",
        ),
        (
            {"s": {"corruption": "fog", "severity": [1, 6]}},
            "shifts.s.severity: should be less than or equal to 5, not 6",
        ),
        (
            {"s": {"corruption": "fog", "severity": []}},
            "shifts.s.severity: Tuple should have at least 1 item",
        ),
        ({"s": {"severity": 2}}, "give either data (another set) or corruption"),
        (
            {"s": {"data": "digits", "corruption": "fog"}},
            "give either data (another set) or corruption",
        ),
        ({"s": {"corruption": "fog", "classes": {"a": "b"}}}, "classes requires data"),
        (
            {"s": {"corruption": "fog", "severty": 2}},
            "no such option of the shift 's'. Did you mean 'severity'?",
        ),
        ({"s": {"data": "cifar"}}, "no such data set: 'cifar'"),
        ({"s": {"data": "sst2"}}, "'sst2' is text data, but 'digits' is image data"),
        ({"": "fog"}, "a shift's name should not be empty"),
        ({"ID": "fog"}, "evaluate.digits.shifts.ID: 'ID' is a column of the table already"),
        ({"mean OOD": "fog"}, "'mean OOD' is a column of the table already"),
        (["fog", "cifar"], "no such data set: 'cifar'"),
        ("fog", "should be a mapping"),
    ],
)
def test_a_mistake_in_a_shift_is_one_line(tmp_path, shifts, words):
    recipe = {**RECIPE, "evaluate": {"digits": {**RECIPE["evaluate"]["digits"], "shifts": shifts}}}
    path = tmp_path / "shifted.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError) as error:
        load(path)
    assert words in str(error.value)
    assert str(error.value).startswith(f"{path}:")
    assert "\n" not in str(error.value)


def test_text_can_not_be_corrupted(tmp_path):
    path = tmp_path / "text.yaml"
    path.write_text(
        "name: t\nbackbone: bert-tiny\ndata: world\n"
        "evaluate: {world-sentiment: {protocols: [knn], shifts: [fog]}}\n"
    )
    with pytest.raises(UserError, match="only images can be corrupted; name other data"):
        load(path)


def test_names_alone_are_data_sets_and_corruptions(tmp_path):
    recipe = {
        **RECIPE,
        "evaluate": {"digits": {**RECIPE["evaluate"]["digits"], "shifts": ["fog", "cifar10.1"]}},
    }
    path = tmp_path / "shifted.yaml"
    path.write_text(yaml.safe_dump(recipe))
    shifts = load(path).evaluate["digits"].shifts
    assert (shifts["fog"].corruption, shifts["fog"].severity) == ("fog", 3)
    assert shifts["cifar10.1"].data.name == "cifar10.1"
    written = tmp_path / "resolved.yaml"
    written.write_text(yaml.safe_dump(load(path).resolved()))
    assert load(written) == load(path)
