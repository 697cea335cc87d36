"""Sweeps: handed to Slurm, beside a published table, and what their tables say."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from sslrun import cli
from sslrun.errors import UserError
from sslrun.recipe import load_sweep
from sslrun.stages.context import Context
from sslrun.stages.sweep import Plan, work

QUICKSTART = str(Path(__file__).parents[2] / "recipes/quickstart.yaml")


@pytest.fixture
def sweep(monkeypatch):
    """The exit code of `sslrun sweep` of the quickstart, with further arguments."""

    def called(*arguments):
        monkeypatch.setattr(sys, "argv", ["sslrun", "sweep", QUICKSTART, *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code

    return called


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Puts an sbatch on the PATH that runs a script; returns the file in which the script finds its arguments."""
    given = tmp_path / "given"

    def put(script):
        path = tmp_path / "bin" / "sbatch"
        path.parent.mkdir()
        path.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {given}\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
        return given

    return put


def test_slurm_gets_an_array_of_workers_that_run_the_same_sweep(sweep, sbatch, capsys):
    given = sbatch("echo Submitted batch job 17")
    options = "--partition gpu --comment 'two words'"
    assert (
        sweep("--jobs", "40", "--slurm", options, "--runs", "my runs", "--set", "pretrain.epochs=5")
        == 0
    )
    assert capsys.readouterr().out == "Submitted batch job 17\n"
    arguments = given.read_text().splitlines()
    assert {"--array=1-40", "--requeue", "--signal=B:TERM@120"} <= set(arguments)
    assert arguments[-6:-2] == ["--partition", "gpu", "--comment", "two words"]
    assert arguments[-2] == "--wrap"
    worker = [
        sys.executable,
        "-m",
        "sslrun",
        "sweep",
        QUICKSTART,
        "--jobs=1",
        "--runs=my runs",
        "--device=auto",
    ]
    assert shlex.split(arguments[-1]) == [
        "exec",
        *worker,
        "--set=pretrain.epochs=5",
    ]  # each of the array is one worker


def test_data_that_is_not_here_is_told_before_slurm_is_asked_as_a_node_may_have_it(
    sweep, sbatch, capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("SSLRUN_DATA", str(tmp_path))
    (tmp_path / "lacking.yaml").write_text(LACKING)
    given = sbatch("")
    assert sweep(str(tmp_path / "lacking.yaml"), "--slurm", "") == 0
    (told,) = capsys.readouterr().err.splitlines()
    assert re.match(r"14 of \d+ runs can't be made here: cifar10: not on this machine", told)
    assert given.exists()


def test_a_refusal_of_slurm_is_one_line(sweep, sbatch, capsys):
    sbatch(
        "echo 'sbatch: error: no such partition: gpo' >&2\necho 'sbatch: error: submission failed' >&2\nexit 1"
    )
    assert sweep("--slurm", "--partition gpo") == 2
    assert (
        capsys.readouterr().err
        == "sslrun: sbatch refused: no such partition: gpo; submission failed\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--slurm", "--comment 'open"], "not options of sbatch: No closing quotation"),
        (["--slurm", "", "--fresh"], "does not go with --slurm"),
    ],
)
def test_nothing_is_submitted_by_mistake(arguments, words, sweep, sbatch, capsys):
    given = sbatch("")
    assert sweep(*arguments) == 2
    assert words in capsys.readouterr().err
    assert not given.exists()


def test_no_slurm_here(sweep, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert sweep("--slurm", "") == 2
    assert "no sbatch on this machine" in capsys.readouterr().err


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
  + BiLSTM: {pretext: ltr, backbone.causal: true, evaluate.sentiment.task.bilstm: true}
"""


def test_a_table_stands_beside_the_published_one_and_says_what_was_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "words.yaml").write_text(ABLATION)
    plan = Plan.of(load_sweep(tmp_path / "words.yaml"), tmp_path / "runs")
    assert work([plan], Context.open("cpu", tmp_path / "runs", False)) == []
    assert (
        sum("pretrain" in job.run.path.name for job in plan.jobs) == 2
    )  # the last two rows share one
    notes = plan.table().notes
    assert [
        each
        for each in notes
        if each.startswith("No NSP: without next-sentence prediction the pairs")
    ]
    assert [
        each
        for each in notes
        if each.startswith("LTR & No NSP, + BiLSTM: whole sequences are read at their last")
    ]
    assert [
        each
        for each in notes
        if each.startswith("+ BiLSTM: the BiLSTM has 1 layer, in each direction")
    ]
    assert any(
        re.match(r"pretrained on: No NSP: 0.0 M tokens in 1 steps, \d+ s; LTR & No NSP: ", each)
        for each in notes
    )
    result = next(job.run.result for job in plan.jobs if "pretrain" in job.run.path.name)
    assert 4 * 8 < result["tokens"] <= 4 * 16
    found = {
        (pair.published_row, pair.published_column) for pair in plan.comparison().tables[0].pairs
    }
    rows = ("No NSP", "LTR & No NSP", "LTR & No NSP + BiLSTM")
    assert found == {(row, "SST-2 (Acc)") for row in rows}


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "bert_table5",
            "bert_table55",
            "words.yaml:2: against: no such published table: 'bert_table55'. Did you mean 'bert_table5'?",
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
def test_what_a_sweep_stands_against_is_checked_before_anything_runs(tmp_path, old, new, told):
    (tmp_path / "words.yaml").write_text(ABLATION.replace(old, new))
    with pytest.raises(UserError) as error:
        Plan.of(load_sweep(tmp_path / "words.yaml"), tmp_path)
    assert told in str(error.value)


LACKING = """\
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
def lacking(tmp_path, monkeypatch, capsys):
    """Runs a sweep where no data set is; returns its exit code, and what it says."""
    monkeypatch.setenv("SSLRUN_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def called(text):
        Path("lacking.yaml").write_text(text)
        monkeypatch.setattr(sys, "argv", ["sslrun", "sweep", "lacking.yaml", "--device", "cpu"])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        said = capsys.readouterr()
        return exit.value.code, said.out, said.err.splitlines()

    return called


NOWHERE = "not on this machine and the hub cannot be reached. Put it at data/"


def test_where_all_data_is_missing_one_line_says_so_and_nothing_is_written(lacking, tmp_path):
    code, _, told = lacking(LACKING)
    assert code == 2
    assert told == [
        f"sslrun: cifar10: {NOWHERE}cifar10, or set SSLRUN_DATA; see `sslrun show data cifar10`"
    ]
    assert not (tmp_path / "runs").exists()


def test_where_some_is_missing_that_is_told_before_and_after_and_the_rest_is_done(lacking):
    code, table, told = lacking(
        LACKING
        + "  three: {data: {name: digits, size: 8}, evaluate: {digits: {protocols: [knn]}, svhn: {protocols: [knn]}}}\n"
    )
    assert code == 2
    assert "three" in table
    assert [re.sub(r"(svhn|cifar10): .*", r"\1", each) for each in told] == [
        "20 of 23 runs can't be made here: cifar10",
        "1 of 23 runs can't be made here: svhn",
        "sslrun: 21 of 23 runs failed, the others are done:",
        "  20: cifar10",
        "  1: svhn",
    ]


def test_a_reason_that_many_runs_fail_for_is_told_once(lacking):
    code, _, told = lacking(
        LACKING.replace("data: cifar10", "data: {name: digits, size: 8}")
        .replace("{cifar10: {", "{digits: {")
        .replace("batch: 8}\n  finetune", "batch: 5000}\n  finetune")
    )
    assert code == 2
    reason = "a batch of 5000 is larger than the 1210 examples: lower batch to 1024"
    assert len(told) == 2
    assert told[0].endswith(f"failed: {reason}")
    assert told[1] == f"sslrun: 14 of 14 runs failed: {reason}"
