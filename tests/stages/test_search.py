"""Searches: the best of some trials by validation data becomes the row, and alone is tested."""

import json
import math
import sys
from types import SimpleNamespace

import pytest

from sslrun import cli
from sslrun.data.splits import Splits
from sslrun.errors import UserError
from sslrun.launch import Workers, build
from sslrun.recipe import load_sweep
from sslrun.stages import archive, status
from sslrun.stages import search as searches
from sslrun.stages.context import Context, Interrupted
from sslrun.stages.evaluate import Cell
from sslrun.stages.pretrain import Pretraining
from sslrun.stages.reporting import Reporter
from sslrun.stages.sweep import Plan, launch
from sslrun.training.device import compute

pytest.importorskip("optuna", reason="optuna is not installed")

SWEEP = """\
name: found
seeds: [0, 1]
base:
  backbone: {name: resnet18, stem: small, channels: 4}
  data: {name: digits, size: 8}
  pretext: rotation
  pretrain: {epochs: 9, batch: 64, lr: 0.5}
  watch: {every: 1}
  evaluate: {digits: {protocols: [knn, probe]}}
rows: {one: {}}
search:
  trials: 8
  objective: {task: digits, protocol: knn}
  space:
    pretrain.lr: {log: [0.0001, 1.0]}
    pretext: [{name: rotation}, {name: simclr, temperature: 0.2}]
"""
PIXELS = """\
name: neighbors
base: {backbone: pixels, data: {name: digits, size: 8}, evaluate: {digits: {protocols: [knn]}}}
search:
  trials: 3
  objective: {task: digits, protocol: knn}
  space: {knn.k: [1, 500]}
"""
ACCURACY = {"name": "accuracy", "unit": "%", "better": "higher", "digits": 1}
LOSS = {"name": "loss", "unit": "", "better": "lower", "digits": 2}


def goodness(recipe):
    """Return a score in percent that is best at a learning rate of 0.01."""
    return 90 - 10 * abs(math.log10(recipe.pretrain.lr) + 2)


@pytest.fixture
def faked(monkeypatch):
    """Replace training by `goodness`; returns the settings of the replacement and its calls."""
    settings = SimpleNamespace(metric=ACCURACY, stop_after=None, cells=[], tested=[])

    def evaluate(cell, context):
        if cell.run.finished:
            return cell.run.result
        if settings.stop_after is not None and len(settings.cells) >= settings.stop_after:
            raise Interrupted("stopped")
        settings.cells.append(cell)
        score = goodness(cell.recipe)
        values = {settings.metric["name"]: score if settings.metric is ACCURACY else -score}
        metrics = {"val": values} if cell.validation_only else {"val": values, "test": values}
        settings.tested += [] if cell.validation_only else [cell]
        cell.run.path.mkdir(parents=True, exist_ok=True)
        cell.run.start({}, {})
        named = {"protocol": cell.protocol, "task": cell.task, "labels": 1.0, "seed": cell.seed}
        texts = {"recipe": "found", "backbone": "resnet18", "pretext": "rotation", "suite": None}
        cell.run.finish(
            {**named, **texts, "metric": settings.metric, "metrics": metrics, "seconds": 1.0}
        )
        return cell.run.result

    def pretrain(job, context):
        job.run.path.mkdir(parents=True, exist_ok=True)
        if job.run.finished:
            return job.run.result
        for epoch in range(1, 10):
            step = SimpleNamespace(epoch=float(epoch), last=epoch == 9)
            if context.on_check is not None:
                context.on_check(step, {"knn": goodness(job.recipe), "rankme": 3.0})
        job.run.start({}, {})
        job.run.finish({"tokens": None, "seconds": 2.0})
        return job.run.result

    monkeypatch.setattr(Cell, "execute", evaluate)
    monkeypatch.setattr(Pretraining, "execute", pretrain)
    return settings


@pytest.fixture
def begin(tmp_path):
    """Plan a sweep in a folder of runs of its own name."""

    def begin(folder="runs", text=SWEEP):
        path = tmp_path / "found.yaml"
        path.write_text(text)
        return Plan.of(load_sweep(path), tmp_path / folder)

    return begin


def launched(plan, **options):
    context = Context(plan.root, compute("cpu"), Reporter(quiet=True), **options)
    workers = Workers((), 1, "cpu", plan.root / "logs", "w")
    assert launch([plan], context, build("local", ()), workers) == []
    return plan.again()


def values_of(plan):
    return [result["values"] for result in plan.searches[0].results]


def test_the_best_trial_becomes_the_row_and_is_tested_alone(begin, faked):
    plan = begin()
    assert [job.run.stage for job in plan.jobs] == ["trial"] * 8  # a row has no cells before
    plan = launched(plan)
    trials = plan.searches[0].results
    best = max(trials, key=lambda result: result["metrics"]["val"]["accuracy"])
    tested = {(cell.protocol, cell.seed, cell.recipe.pretrain.lr) for cell in faked.tested}
    lr = best["values"]["pretrain.lr"]
    assert tested == {(name, seed, lr) for name in ("knn", "probe") for seed in (0, 1)}
    assert all(cell.seed == 0 for cell in faked.cells if cell.validation_only)
    for record in plan.root.rglob("result.json"):
        result = json.loads(record.read_text())
        assert result.get("stage") != "trial" or "test" not in result.get("metrics", {})
    assert len({json.dumps(values) for values in values_of(plan)}) == 8
    table = plan.table()
    (note,) = (note for note in table.notes if "trials" in note)
    assert note.startswith(f"one: lr={lr}, pretext=")
    assert "best of 8 of 8 trials" in note
    assert "accuracy of knn on the validation data of digits" in note


def test_a_search_that_was_stopped_goes_on_to_the_same_trials(begin, faked):
    whole = launched(begin("whole"))
    for stop in (0, 3):
        faked.cells, faked.stop_after = [], stop
        with pytest.raises(Interrupted):
            launched(begin(f"stopped-{stop}"))
        faked.stop_after = None
        # A killed writer of the journal leaves half a line.
        journal = begin(f"stopped-{stop}").root / "found" / searches.JOURNAL
        journal.write_text(journal.read_text() + '{"op_code": 5, "wor')
        plan = launched(begin(f"stopped-{stop}"))
        assert values_of(plan) == values_of(whole)
        assert plan.searches[0].describe().startswith(whole.searches[0].describe().split(":")[0])
    study = whole.searches[0].trials[0]._open_study()
    assert [trial.user_attrs["number"] for trial in study.trials] == list(range(8))


def test_more_trials_continue_a_search_and_fresh_begins_it_again(begin, faked):
    first = values_of(launched(begin()))
    faked.cells = []
    more = launched(begin(text=SWEEP.replace("trials: 8", "trials: 10")))
    assert values_of(more)[:8] == first
    assert sum(cell.validation_only for cell in faked.cells) == 2
    faked.cells = []
    assert values_of(launched(begin(), fresh=True)) == first
    assert sum(cell.validation_only for cell in faked.cells) == 8


def test_where_lower_is_better_the_lowest_is_chosen(begin, faked):
    faked.metric = LOSS
    results = launched(begin()).searches[0].results
    best = min(results, key=lambda result: result["metrics"]["val"]["loss"])
    assert {cell.recipe.pretrain.lr for cell in faked.tested} == {best["values"]["pretrain.lr"]}


@pytest.mark.parametrize("diagnostic", ["knn", "rankme"])
def test_halving_stops_trials_that_are_worse_at_the_same_check(begin, faked, diagnostic):
    plan = launched(begin(text=f"{SWEEP}  prune: {diagnostic}\n"))
    results = plan.searches[0].results
    pruned = [result for result in results if result["state"] == "pruned"]
    if diagnostic == "rankme":  # equal everywhere, so that none is worse
        assert pruned == []
        return
    complete = [goodness_of(result) for result in results if result["state"] == "complete"]
    assert pruned
    assert max(map(goodness_of, pruned)) < max(complete)
    assert "is not in the best third" in pruned[0]["reason"]
    assert f"{len(pruned)} pruned" in plan.searches[0].describe()
    texts = [run.get("text", "") for run in status.describe_status(plan)["runs"]]
    assert sum(text.startswith("pruned: knn ") for text in texts) == len(pruned)
    leftovers = archive.find_leftovers(plan.root, None)
    assert [leftover.kind for leftover in leftovers] == ["failed runs"] * len(pruned)


def goodness_of(result):
    return goodness(SimpleNamespace(pretrain=SimpleNamespace(lr=result["values"]["pretrain.lr"])))


def test_values_that_exclude_each_other_fail_their_trial_alone(begin, faked):
    space = "    pretrain.batch: [64, 63]\n    pretrain.accumulate: [1, 2]\n"
    plan = launched(
        begin(text=SWEEP.replace("pretrain: {epochs: 9", "pretrain: {steps: 5") + space)
    )
    states = [result["state"] for result in plan.searches[0].results]
    assert set(states) == {"complete", "failed"}


def test_no_trial_reads_the_test_split(begin, monkeypatch):
    """The real protocol on real data: the test split opens when the search is done."""
    plan = begin(text=PIXELS)
    test = Splits.test.func

    def guarded(splits):
        assert plan.again().searches[0].finished
        return test(splits)

    monkeypatch.setattr(Splits, "test", property(guarded))
    done = launched(plan)
    assert done.searches[0].best["values"] == {"knn.k": 1}
    assert [cell.evaluation.options["knn"].k for _, cell in done.cells] == [1]
    assert done.finished


def test_a_missing_optuna_is_one_line(begin, monkeypatch, tmp_path, capsys):
    begin()
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr(
        sys,
        "argv",
        ["sslrun", "sweep", str(tmp_path / "found.yaml"), "--runs", str(tmp_path / "runs")],
    )
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 2
    assert "search: needs optuna: pip install 'sslrun[search]'" in capsys.readouterr().err


def test_a_damaged_journal_is_one_line(begin, faked):
    plan = launched(begin())
    journal = plan.root / "found" / searches.JOURNAL
    journal.write_text("nonsense\n" * 3)
    with pytest.raises(UserError, match=r"search\.journal: damaged .* remove it"):
        plan.searches[0].trials[0]._open_study()
