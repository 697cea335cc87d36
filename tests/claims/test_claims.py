"""Claims: verdicts on planted results, errors named by line, variants by budget."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from sslrun.claims.measurements import speed
from sslrun.claims.report import format_markdown, write
from sslrun.claims.run import Measurements, Measuring, Trial
from sslrun.claims.schema import load_claim, load_claims
from sslrun.errors import UserError
from sslrun.recipe import Named
from sslrun.stages.context import Context
from sslrun.training.device import compute

FOLDER = Path(__file__).parents[2] / "recipes/claims"
SWEEP = """\
name: planted
base:
  backbone: {name: mlp, width: 8, depth: 1}
  data: {name: digits, size: 8}
  evaluate:
    digits: {protocols: [probe, scratch, knn], labels: [0.1, 1.0]}
rows:
  wide: {backbone.width: 16}
  narrow: {}
seeds: [0, 1, 2]
"""
CLAIM = """\
number: 3
title: Wide networks do better
says: ["wide is good"]
source: nowhere
otherwise: they are all the same
variants:
  small:
    minutes: 2
    measured: a laptop
    sweep: sweep.yaml
    inequalities:
      - {greater: [wide, scratch, digits, 10 %], lesser: [narrow, scratch, digits, 10 %], margin: 1}
      - greater: {gain: [wide, scratch, digits, 10 %], over: [narrow, scratch, digits, 10 %]}
        lesser: {gain: [wide, scratch, digits, 100 %], over: [narrow, scratch, digits, 100 %]}
      - {greater: [narrow, probe, digits, 10 %], lesser: 99, reported: true}
  large:
    minutes: 50
    sweep: sweep.yaml
    seeds: [0, 1, 2, 3]
    inequalities: [{greater: [wide, probe, digits, 100 %], lesser: [narrow, probe, digits, 100 %]}]
  largest:
    minutes: 9
    device: cuda
    sweep: sweep.yaml
    inequalities: [{greater: [wide, knn, digits, 100 %], lesser: [narrow, knn, digits, 100 %]}]
"""
METRIC = {"name": "accuracy", "unit": "%", "better": "higher", "digits": 1}


@pytest.fixture
def claim(tmp_path):
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    (tmp_path / "wide.yaml").write_text(CLAIM)
    return load_claim(tmp_path / "wide.yaml")


def plant(trial, values):
    """Finish a trial's runs with accuracies by row and label fraction, one per seed."""
    for row, cell in trial.plan.cells:
        value = values.get((row, cell.labels), [50, 50, 50])[cell.seed]
        cell.run.start({}, {"device": "cpu (2 threads)", "threads": 2})
        cell.run.finish(
            {
                "stage": cell.protocol,
                "protocol": cell.protocol,
                "recipe": "planted",
                "backbone": "mlp",
                "pretext": None,
                "task": cell.task,
                "labels": cell.labels,
                "seed": cell.seed,
                "metric": METRIC,
                "metrics": {"test": {"accuracy": value}},
                "seconds": 3.6,
            }
        )


BETTER, WORSE, SAME = [60, 61, 62.5], [50, 51, 52], [50.5, 50, 53]


@pytest.mark.parametrize(
    ("values", "word"),
    [
        (
            {
                ("wide", 0.1): BETTER,
                ("narrow", 0.1): WORSE,
                ("wide", 1.0): SAME,
                ("narrow", 1.0): WORSE,
            },
            "supported",
        ),
        ({("wide", 0.1): WORSE, ("narrow", 0.1): BETTER}, "contradicted"),
        ({("wide", 0.1): SAME, ("narrow", 0.1): WORSE}, "inconclusive"),
        # The first inequality holds; the gain has the opposite sign.
        (
            {
                ("wide", 0.1): BETTER,
                ("narrow", 0.1): WORSE,
                ("wide", 1.0): [90, 92, 92.5],
                ("narrow", 1.0): WORSE,
            },
            "contradicted",
        ),
    ],
)
def test_planted_results_give_the_planted_verdicts(claim, tmp_path, values, word):
    trial = Trial.within_budget(5, False, claim, tmp_path / "runs")
    assert trial.judge().word == "inconclusive"  # there are no results yet
    plant(trial, values)
    outcome = trial.judge()
    assert outcome.word == word
    assert outcome.judged[2][
        2
    ]  # a reported inequality does not count; this one is always contradicted
    assert outcome.judged[2][1].word == "contradicted"
    assert outcome.cost.seconds == pytest.approx(3.6 * 15)
    assert outcome.cost.core_hours == pytest.approx(3.6 * 15 * 2 / 3600)
    text = format_markdown([outcome], "by hand")
    assert f"| 3 | [Wide networks do better](#wide) | {word} | 54 | 0.03 |" in text
    assert "The interval is Student's t with fewer than 10 seeds" in text
    assert ("they are all the same" in text) == (word == "contradicted")
    assert re.search(
        r"- reported only, narrow · probe · digits · 10 % > 99 "
        r"\([\d.]+ against 99.00\): contradicted: -",
        text,
    )
    assert outcome.as_dict()["otherwise"] == (
        "they are all the same" if word == "contradicted" else None
    )


def test_missing_cells_are_reported_with_their_reason(claim, tmp_path):
    trial = Trial.within_budget(5, False, claim, tmp_path / "runs")
    assert list(trial.judge().describe_inequalities()) == ["no cell is computed: not run yet"]
    for job in trial.plan.jobs:
        job.run.fail("digits: no such file")
    assert "- no cell is computed: digits: no such file" in format_markdown([trial.judge()], "")
    assert trial.judge().as_dict()["failure"] == "digits: no such file"
    plant(trial, {})
    assert trial.judge().failure is None
    lost = trial.plan.jobs[-1].run
    (lost.path / "result.json").unlink()
    lost.fail("diverged")
    assert list(trial.judge().describe_inequalities())[-1] == "runs are missing: diverged"


def test_only_cells_of_the_inequalities_are_run(claim, tmp_path):
    plan = Trial.within_budget(5, False, claim, tmp_path).plan
    assert {(row, cell.protocol, cell.labels) for row, cell in plan.cells} == {
        ("wide", "scratch", 0.1),
        ("wide", "scratch", 1.0),
        ("narrow", "scratch", 0.1),
        ("narrow", "scratch", 1.0),
        ("narrow", "probe", 0.1),
    }
    assert len(plan.jobs) == 15


def test_the_budget_picks_the_largest_variant_that_fits(claim, tmp_path):
    assert [claim.choose(minutes, cuda=False) for minutes in (1, 2, 10, 60)] == [
        None,
        "small",
        "small",
        "large",
    ]
    assert claim.choose(10, cuda=True) == "largest"
    named = tmp_path / "wide.yaml"  # not in the folder where claims are found by name
    assert claim.larger(None) == f"sslrun claims {named} --budget 2"
    assert claim.larger("small") == f"sslrun claims {named} --budget 9 (needs a GPU)"
    assert claim.larger("large") is None
    assert {
        cell.seed for _, cell in Trial.within_budget(60, False, claim, tmp_path).plan.cells
    } == {
        0,
        1,
        2,
        3,
    }
    none = Trial.within_budget(1, False, claim, tmp_path)
    assert none.plan is None
    assert (none.judge().word, list(none.judge().describe_inequalities())) == (
        "inconclusive",
        ["no variant fits this budget and this machine"],
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "minutes: 2",
            "minuts: 2",
            "wide.yaml:8: variants.small.minuts: no such option of a variant. "
            "Did you mean 'minutes'?",
        ),
        (
            "lesser: 99",
            "lesser: [narrow, 10]",
            "wide.yaml:15: variants.small.inequalities.2.lesser: should be a cell",
        ),
        (
            "[narrow, probe, digits, 10 %]",
            "98",
            "wide.yaml:15: variants.small.inequalities.2: compares two numbers",
        ),
        (
            "    sweep: sweep.yaml\n    inequalities:\n",
            "    inequalities:\n",
            "wide.yaml:7: variants.small: give either sweep",
        ),
        (
            "    sweep: sweep.yaml\n    inequalities:\n",
            "    measure: sped\n    inequalities:\n",
            "wide.yaml:10: variants.small.measure: no such measurement: 'sped'. "
            "Did you mean 'speed'?",
        ),
        (
            "    sweep: sweep.yaml\n    inequalities:\n",
            "    measure: {name: speed, length: 3}\n    inequalities:\n",
            "wide.yaml:10: variants.small.measure.length: no such option of 'speed'. "
            "Did you mean 'lengths'?",
        ),
        ("otherwise: they are all the same\n", "", "wide.yaml:1: 'otherwise' is missing"),
    ],
)
def test_errors_in_claims_name_their_line(tmp_path, old, new, message):
    assert old in CLAIM
    (tmp_path / "wide.yaml").write_text(CLAIM.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        load_claim(tmp_path / "wide.yaml")
    assert message in str(error.value)


def test_a_cell_that_the_table_lacks_is_named_before_anything_runs(tmp_path):
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    (tmp_path / "wide.yaml").write_text(
        CLAIM.replace(
            "over: [narrow, scratch, digits, 10 %]", "over: [narow, scratch, digits, 10 %]"
        )
    )
    with pytest.raises(UserError) as error:
        Trial.of_variant(load_claim(tmp_path / "wide.yaml"), "small", tmp_path)
    assert (
        "wide.yaml:13: variants.small.inequalities.1.greater.over: "
        "no such cell of the table: 'narow · scratch" in str(error.value)
    )
    assert "Did you mean 'narrow · scratch · digits · 10 %'?" in str(error.value)


@pytest.mark.usefixtures("claim")
def test_claims_are_found_by_name_and_by_file(tmp_path):
    assert [claim.name for claim in load_claims(["wide"], tmp_path)] == ["wide"]
    assert [
        claim.name for claim in load_claims([str(tmp_path / "wide.yaml")], tmp_path / "none")
    ] == ["wide"]
    with pytest.raises(UserError, match=r"no such claim: 'wid'\. Did you mean 'wide'\?"):
        load_claims(["wid"], tmp_path)
    with pytest.raises(UserError, match="no claims there"):
        load_claims([], tmp_path / "none")


def test_verdicts_are_written_in_two_formats(claim, tmp_path):
    outcome = Trial.within_budget(1, False, claim, tmp_path).judge()
    write([outcome], tmp_path / "found.json", "")
    (verdict,) = json.loads((tmp_path / "found.json").read_text())
    assert (verdict["name"], verdict["verdict"], verdict["larger"]) == (
        "wide",
        "inconclusive",
        f"sslrun claims {tmp_path / 'wide.yaml'} --budget 2",
    )
    with pytest.raises(UserError, match=r"end in .md or .json"):
        write([outcome], tmp_path / "found.txt", "")


# ---------------------------------------------------------------- shipped claims

CLAIMS = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
CHEAP = {
    "guess": {"steps": 1, "batch": 2, "gaps": 20},
    "colors": {"steps": 1, "batch": 4, "images": 8},
    "order": {
        "steps": 1,
        "batch": 4,
        "draws": 1,
        "films": {"labels": "pattern", "size": 16, "films": 30, "test_films": 4},
    },
    "equivariant-maps": {"steps": 1, "batch": 2},
    "distortion": {"dimensions": 20, "features": 2, "span": 8, "examples": 16},
}
"""Options that make slow measurements quick."""


def test_all_ten_claims_have_a_variant_of_minutes_on_a_cpu():
    claims = [load_claim(path) for path in CLAIMS.values()]
    short = {
        claim.number
        for claim in claims
        if any(value.device == "cpu" and value.minutes <= 15 for value in claim.variants.values())
    }
    assert short >= set(range(1, 11))


@pytest.mark.parametrize("name", CLAIMS)
def test_quotations_of_claims_occur_in_the_lecture(name):
    data = os.environ.get("SSLRUN_DATA")
    lecture = Path(data).parent / "lecture.md" if data else None
    if lecture is None or not lecture.is_file():
        pytest.skip("the lecture is not beside SSLRUN_DATA")
    text = lecture.read_text(encoding="utf-8")
    claim, slides = load_claim(CLAIMS[name]), re.findall(r"^# (.+)$", text, re.MULTILINE)
    for sentence in claim.says:
        assert sentence in " ".join(text.split())
    assert set(re.findall(r'"(.+?)"', claim.source)) <= set(slides)


@pytest.mark.parametrize("name", CLAIMS)
def test_each_claim_can_be_run(name, tmp_path):
    """Its cells are those of its sweep, and each has more than one value."""
    claim = load_claim(CLAIMS[name])
    for variant, chosen in claim.variants.items():
        if chosen.measure is None:
            assert Trial.of_variant(claim, variant, tmp_path).plan.jobs
            assert len(claim.sweep(variant).seeds) > 1 or any(
                task.restarts > 1
                for row in claim.sweep(variant).rows.values()
                for task in row.evaluate.values()
            )


@pytest.mark.parametrize(
    "name", [name for name, path in CLAIMS.items() if "measure:" in path.read_text()]
)
def test_a_measurement_has_the_cells_that_its_claim_names(name, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "_time_steps", lambda steps, *_: dict.fromkeys(steps, 1.0))
    claim = load_claim(CLAIMS[name])
    for variant, chosen in claim.variants.items():
        if chosen.measure is None:
            continue
        options = {**chosen.measure.options.model_dump(), **CHEAP.get(chosen.measure.name, {})}
        if chosen.measure.name == "guess":
            options["data"] = {
                "name": "world",
                "length": 64,
                "documents": 150,
                "tokenizer": {"vocab": 600},
            }
        if chosen.measure.name == "colors":
            pixels = torch.randint(256, (40, 16, 16, 3), generator=torch.Generator().manual_seed(0))
            np.savez(tmp_path / "images.npz", images=pixels.byte().numpy())
            options["data"] = {"name": "npz", "path": str(tmp_path / "images.npz")}
        measure = Named(name=chosen.measure.name, options=type(chosen.measure.options)(**options))
        job = Measuring(measure, 0, tmp_path)
        result = job.execute(Context(tmp_path, compute("cpu")))
        assert result == job.execute(
            Context(tmp_path, compute("cpu"))
        )  # read from the run, not measured again
        table = Measurements("", (job,)).table()
        assert len(table.cells) == len(result["table"]["cells"])
        assert claim.inequalities(variant, list(table.cells))
