"""Sweeps: their workers, comparison with a published table, and error reports."""

import re
import sys
from pathlib import Path

import pytest

from sslrun import cli
from sslrun.errors import UserError
from sslrun.launch.slurm import Slurm
from sslrun.recipe import load_sweep
from sslrun.stages.context import Context
from sslrun.stages.sweep import Plan, work

QUICKSTART = str(Path(__file__).parents[2] / "recipes/quickstart.yaml")


@pytest.fixture
def sweep(monkeypatch):
    """Run `sslrun sweep` on the quickstart with further arguments; returns the exit code."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sslrun", "sweep", QUICKSTART, *arguments])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        return exit_info.value.code

    return run


def test_an_engine_is_given_workers_of_the_same_sweep(sweep, monkeypatch, capsys):
    def submit(engine, workers):
        assert engine.options.partition == "gpu"
        assert workers.arguments == (
            "sweep", QUICKSTART, "--set=pretrain.epochs=5", "--runs=my runs"
        )  # fmt: skip
        assert workers.command("auto", 10.0)[-2:] == ("--device=auto", "--worker=10.0")
        return f"{workers.count} workers"

    monkeypatch.setattr(Slurm, "submit", submit)
    arguments = ["--jobs", "40", "--runs", "my runs", "--set", "pretrain.epochs=5"]
    assert sweep("--engine", "slurm", "-E", "partition=gpu", *arguments) == 0
    assert capsys.readouterr().out == "40 workers\n"


def test_missing_data_is_a_warning_before_submission(sweep, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SSLRUN_DATA", str(tmp_path))
    monkeypatch.setattr(Slurm, "submit", lambda *_: "submitted")
    (tmp_path / "lacking.yaml").write_text(WITHOUT_DATA)
    assert sweep(str(tmp_path / "lacking.yaml"), "--engine", "slurm") == 0
    output = capsys.readouterr()
    assert output.out == "submitted\n"
    (warning,) = output.err.splitlines()
    assert re.match(r"14 of \d+ runs can't be made here: cifar10: not on this machine", warning)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "slrum"], "no such engine: 'slrum'. Did you mean 'slurm'?"),
        (["--engine", "slurm", "--per-gpu", "2"], "--per-gpu does not go with --engine slurm"),
        (["-E", "time=4h"], "-E time=4h: the engine 'local' has no options"),
    ],
)
def test_mistakes_about_engines_are_one_line(arguments, words, sweep, capsys):
    assert sweep(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


ABLATION = """\
name: words
against: {table: bert_table5, columns: {sentiment: SST-2}}
base:
  backbone: {name: bert-tiny, depth: 1, width: 16, heads: 2, positions: 16}
  data: {name: world, documents: 40, length: 16, tokenizer: {vocab: 200}}
  pretext: mlm
  pretrain: {steps: 1, batch: 4}
  finetune: {steps: 1, batch: 4}
  evaluate:
    sentiment: {data: {name: world-sentiment, train: 8, held_out: 8}, protocols: [finetune]}
rows:
  No NSP: {}
  LTR & No NSP: {pretext: ltr, backbone.causal: true}
  + BiLSTM: {pretext: ltr, backbone.causal: true, evaluate.sentiment.task.bilstm: 1}
"""


def test_a_table_is_compared_with_the_published_one_and_notes_its_choices(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "words.yaml").write_text(ABLATION)
    plan = Plan.of(load_sweep(tmp_path / "words.yaml"), tmp_path / "runs")
    assert work([plan], Context.open("cpu", tmp_path / "runs", False)) == []
    assert (
        sum("pretrain" in job.run.path.name for job in plan.jobs) == 2
    )  # the last two rows share a pretraining run
    notes = plan.table().notes
    assert [
        note
        for note in notes
        if note.startswith("No NSP: without next-sentence prediction the pairs")
    ]
    assert [
        note
        for note in notes
        if note.startswith("LTR & No NSP, + BiLSTM: whole sequences are read at their last")
    ]
    assert [
        note
        for note in notes
        if note.startswith("+ BiLSTM: the BiLSTM has 1 layer, in each direction")
    ]
    assert any(
        re.match(r"pretrained on: No NSP: 0.0 M tokens in 1 steps, \d+ s; LTR & No NSP: ", note)
        for note in notes
    )
    result = next(job.run.result for job in plan.jobs if "pretrain" in job.run.path.name)
    assert 4 * 8 < result["tokens"] <= 4 * 16
    matched = {
        (pair.published_row, pair.published_column)
        for pair in plan.compare(plan.table()).tables[0].pairs
    }
    rows = ("No NSP", "LTR & No NSP", "LTR & No NSP + BiLSTM")
    assert matched == {(row, "SST-2 (Acc)") for row in rows}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "bert_table5",
            "bert_table55",
            "words.yaml:2: against: no such published table: 'bert_table55'. "
            "Did you mean 'bert_table5'?",
        ),
        (
            "sentiment: SST-2",
            "sentimen: SST-2",
            "words.yaml:2: against: no task 'sentimen' is evaluated. Did you mean 'sentiment'?",
        ),
        (
            "sentiment: SST-2",
            "sentiment: SST",
            "words.yaml:2: against: there is no column 'SST'. There is: MNLI-m",
        ),
        (
            "columns: {",
            "colums: {",
            "against.colums: no such option of a sweep. Did you mean 'columns'?",
        ),
    ],
)
def test_the_against_section_is_checked_before_any_run(tmp_path, old, new, message):
    (tmp_path / "words.yaml").write_text(ABLATION.replace(old, new))
    with pytest.raises(UserError) as error:
        Plan.of(load_sweep(tmp_path / "words.yaml"), tmp_path)
    assert message in str(error.value)


WITHOUT_DATA = """\
name: lacking
base:
  backbone: {name: mlp, width: 8, depth: 1}
  data: cifar10
  pretext: rotation
  pretrain: {steps: 1, batch: 8}
  finetune: {steps: 1, batch: 8}
  evaluate: {cifar10: {protocols: [knn, lpft], labels: [1.0, 0.5]}}
rows:
  one: {}
  two: {pretext: simclr}
"""


@pytest.fixture
def run_without_data(tmp_path, monkeypatch, capsys):
    """Run a sweep without any data set; returns its exit code, stdout and lines of stderr."""
    monkeypatch.setenv("SSLRUN_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def run(text):
        Path("lacking.yaml").write_text(text)
        monkeypatch.setattr(sys, "argv", ["sslrun", "sweep", "lacking.yaml", "--device", "cpu"])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        output = capsys.readouterr()
        return exit_info.value.code, output.out, output.err.splitlines()

    return run


NOWHERE = "not on this machine and the hub cannot be reached. Put it at data/"


def test_if_all_data_is_missing_there_is_one_error_line_and_no_output(run_without_data, tmp_path):
    code, _, lines = run_without_data(WITHOUT_DATA)
    assert code == 2
    assert lines == [
        f"sslrun: cifar10: {NOWHERE}cifar10, or set SSLRUN_DATA; see `sslrun show data cifar10`"
    ]
    assert not (tmp_path / "runs").exists()


def test_if_some_data_is_missing_the_other_runs_finish_and_both_are_reported(run_without_data):
    code, table, lines = run_without_data(
        WITHOUT_DATA + "  three: {data: {name: digits, size: 8}, "
        "evaluate: {digits: {protocols: [knn]}, svhn: {protocols: [knn]}}}\n"
    )
    assert code == 2
    assert "three" in table
    assert [re.sub(r"(svhn|cifar10): .*", r"\1", line) for line in lines] == [
        "20 of 23 runs can't be made here: cifar10",
        "1 of 23 runs can't be made here: svhn",
        "sslrun: 21 of 23 runs failed, the others are done:",
        "  20: cifar10",
        "  1: svhn",
    ]


def test_a_failure_shared_by_many_runs_is_reported_once(run_without_data):
    code, _, lines = run_without_data(
        WITHOUT_DATA.replace("data: cifar10", "data: {name: digits, size: 8}")
        .replace("{cifar10: {", "{digits: {")
        .replace("batch: 8}\n  finetune", "batch: 5000}\n  finetune")
    )
    assert code == 2
    reason = "a batch of 5000 is larger than the 1210 examples: lower batch to 1024"
    assert len(lines) == 2
    assert lines[0].endswith(f"failed: {reason}")
    assert lines[1] == f"sslrun: 14 of 14 runs failed: {reason}"
