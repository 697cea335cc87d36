"""The command line as a user meets it: every command in a process of its own, on small data."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sslrun.backbones import build_backbone
from sslrun.data.source import sources
from sslrun.data.specs import ImageSpec, TextSpec
from sslrun.pretexts.base import pretexts
from sslrun.recipe import load, load_sweep
from sslrun.stages.check import backbone_spec
from sslrun.stages.sweep import Plan

RECIPES = Path(__file__).parents[2] / "recipes"
WEIGHTS = "backbone.safetensors"
RECIPE = """\
name: tiny
backbone: {name: vit-tiny, patch: 4, depth: 1, width: 32, heads: 2, pool: mean}
pretext: rotation
data: {name: digits, size: 8}
pretrain: {epochs: 2, batch: 64, lr: 0.002}
watch: {every: 1}
evaluate:
  digits:
    protocols: [knn, probe, finetune, lpft, scratch]
    labels: [0.1]
finetune: {steps: 3, batch: 32, lr: [0.001, 0.01]}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path


def result(folder, stage):
    (path,) = folder.glob(f"runs/tiny/{stage}-*/result.json")
    return json.loads(path.read_text())


def test_pretrain_then_every_protocol_then_the_table(folder, sslrun):
    missing = sslrun("probe", "tiny.yaml", cwd=folder, code=2).stderr
    assert "run `sslrun pretrain tiny.yaml` first, or pass --from" in missing
    path = Path(folder / sslrun("pretrain", "tiny.yaml", cwd=folder).stdout.strip())
    weights = (path / WEIGHTS).read_bytes()
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert {"knn", "rankme", "feature_std"} <= set(records[-1])
    for protocol in ("knn", "probe", "lpft", "finetune", "scratch"):
        assert protocol in sslrun(protocol, "tiny.yaml", cwd=folder).stdout
    assert (path / WEIGHTS).read_bytes() == weights
    assert set(result(folder, "finetune")["tried"]) == {"0.001", "0.01"}
    assert (
        result(folder, "lpft")["metrics"]["test"]["accuracy"]
        > result(folder, "scratch")["metrics"]["test"]["accuracy"]
    )
    table = json.loads(sslrun("table", "--json", "-o", "t.md", cwd=folder).stdout)
    assert len(table["cells"]) == 5
    assert "± " not in (folder / "t.md").read_text()
    # A second call reads the stored result; --fresh repeats the run and finds the same.
    first = result(folder, "probe")
    sslrun("probe", "tiny.yaml", cwd=folder)
    assert result(folder, "probe") == first
    sslrun("probe", "tiny.yaml", "--fresh", cwd=folder)
    assert result(folder, "probe")["metrics"] == first["metrics"]
    assert result(folder, "probe")["finished"] != first["finished"]
    sslrun("knn", "tiny.yaml", "--from", path, cwd=folder)
    assert len(list(folder.glob("runs/tiny/knn-*"))) == 2
    (folder / "bad.safetensors").write_bytes(b"x" * 100)
    assert (
        "not a checkpoint"
        in sslrun("knn", "tiny.yaml", "--from", "bad.safetensors", cwd=folder, code=2).stderr
    )
    other = sslrun("knn", "tiny.yaml", "backbone=mlp", "--from", path, cwd=folder, code=2).stderr
    assert "this checkpoint holds 'vit-tiny'" in other


@pytest.fixture(scope="module")
def pretrain(tmp_path_factory, start_command):
    """Return `start(*arguments)` for one pretraining; `weights` are those of a whole one."""
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "tiny.yaml").write_text(RECIPE)

    def start(*arguments):
        command = ["pretrain", "tiny.yaml", "pretrain.epochs=5", *arguments]
        return start_command(command, folder, {**os.environ, "OMP_NUM_THREADS": "1"})

    start.folder = folder
    start.weights = (folder / start().finish().stdout.strip() / WEIGHTS).read_bytes()
    return start


def test_an_interrupted_pretraining_continues_to_the_same_bits(pretrain):
    process = pretrain("--runs", "stopped")
    process.wait_for(pretrain.folder, "stopped/tiny/*/metrics.jsonl")
    os.kill(process.pid, signal.SIGINT)
    code, _, stderr = process.finish()
    assert code == 130
    assert "stopped by SIGINT" in stderr
    assert "same command again" in stderr
    continued = pretrain("--runs", "stopped").finish()
    assert re.search(r"continues after step \d+", continued.stderr)
    resumed = pretrain.folder / continued.stdout.strip()
    assert (resumed / WEIGHTS).read_bytes() == pretrain.weights


def test_kill_9_loses_only_the_steps_after_the_last_checkpoint(pretrain):
    arguments = ("watch.checkpoint=1.0e-6", "--runs", "killed")
    process = pretrain(*arguments)
    process.wait_for(pretrain.folder, "killed/tiny/*/checkpoint/step-0000000[1-9]?")
    os.kill(process.pid, signal.SIGKILL)
    assert process.finish().returncode == -signal.SIGKILL
    continued = pretrain(*arguments).finish()
    assert re.search(r"continues after step \d\d+", continued.stderr)
    resumed = pretrain.folder / continued.stdout.strip()
    assert (resumed / WEIGHTS).read_bytes() == pretrain.weights
    assert not (resumed / "checkpoint").exists()


def test_a_sweep_shares_runs_among_rows_and_workers(folder, sslrun):
    (folder / "few.yaml").write_text(
        "name: few\nbase: tiny.yaml\nrows:\n"
        "  one: {evaluate.digits.protocols: [knn]}\n"
        "  two: {evaluate.digits.protocols: [knn, probe]}\n"
        "  pixels: {backbone: pixels, pretext: null, evaluate.digits.protocols: [knn]}\n"
    )
    output = sslrun("sweep", "few.yaml", "--jobs", 2, cwd=folder).stdout
    assert all(row in output for row in ("one", "two", "pixels"))
    stages = sorted(path.name.split("-")[0] for path in folder.glob("runs/tiny/*-*"))
    assert stages == ["knn", "knn", "pretrain", "probe"]
    assert {path.suffix for path in (folder / "runs/few").iterdir()} == {
        ".md",
        ".tex",
        ".csv",
        ".json",
        "",  # the folder of the workers' logs
    }
    assert "one" in sslrun("table", "few.yaml", cwd=folder).stdout


def test_user_errors_are_one_line_and_write_no_result(folder, sslrun):
    for arguments, words in (
        (["pretrain", "tiny.yaml", "pretrain.epoch=3"], "Did you mean 'epochs'?"),
        (["pretrain", "none.yaml"], "no such file"),
        (["pretrain", "tiny.yaml", "--device", "cuda:9"], "not on this machine"),
        (["pretrain", "tiny.yaml", "data=cifar10"], "see `sslrun show data cifar10`"),
        (["pretrain", "tiny.yaml", "pretrain.batch=5000"], "lower batch to 1024"),
        (
            ["scratch", "tiny.yaml", "evaluate.digits.labels=[0.001]"],
            "the smallest fraction that works",
        ),
        (["table"], "no finished evaluation"),
        (["show", "pretexts", "simclear"], "'simclr'"),
        (
            ["pretrain", "tiny.yaml", "pretrain.optimizer=sgd", "pretrain.lr=1e9"],
            "not finite at step",
        ),
    ):
        error = sslrun(
            *arguments, cwd=folder, code=2, SSLRUN_DATA=str(folder), HF_HUB_OFFLINE="1"
        ).stderr
        lines = [line for line in error.splitlines() if "running for" not in line]  # progress
        assert len(lines) == 1, error
        assert words in lines[0]
    assert not list(folder.rglob("result.json"))


def test_help_show_and_check(folder, sslrun):
    command = [sys.executable, "-m", "sslrun", "--help"]  # the entry point, in a process of its own
    assert b"pretrain" in subprocess.check_output(command, cwd=folder)
    assert "simclr" in sslrun("show", cwd=folder).stdout
    options = json.loads(sslrun("show", "pretext", "simclr", "--json", cwd=folder).stdout)[
        "options"
    ]
    assert {"temperature", "augmentation"} <= {option["name"] for option in options}
    (checked,) = json.loads(sslrun("check", "tiny.yaml", "--json", cwd=folder).stdout)
    assert (checked["steps"], checked["cells"]) == (36, 5)
    assert checked["flops"] > 0


@pytest.mark.parametrize(
    "path",
    sorted(
        path
        for kind in ("image", "text", "video", "graph", "control")
        for path in RECIPES.glob(f"{kind}/*.yaml")
    ),
    ids=lambda path: path.stem,
)
def test_recipes_are_valid(path):
    sweep = load_sweep(path)  # a recipe is a sweep of one row
    assert sweep.name == path.stem
    for recipe in sweep.rows.values():
        assert recipe.evaluate
        build_on_meta_device(recipe)


@pytest.mark.parametrize(
    "path",
    [RECIPES / "quickstart.yaml", *sorted(RECIPES.glob("sweeps/*.yaml"))],
    ids=lambda path: path.stem,
)
def test_sweeps_are_valid(path, tmp_path):
    sweep = load_sweep(path)
    assert sweep.name == path.stem
    plan = Plan.of(sweep, tmp_path)
    assert plan.cells or plan.searches
    for recipe in sweep.rows.values():
        build_on_meta_device(recipe)


def build_on_meta_device(recipe):
    """Build a recipe's backbone and pretext task on the meta device, without memory or time.

    Encoders of transformers are skipped: their shape is on the hub (tests/acceptance/test_text.py
    loads one from a folder).
    """
    if recipe.backbone.name == "hf":
        return
    if "Hopper" in getattr(recipe.data.options, "environment", ""):
        pytest.importorskip("mujoco", reason="the environment needs MuJoCo")
    with torch.device("meta"):
        spec, _ = sources[recipe.data.name](recipe.data.options).sketch(2)
        spec = backbone_spec(recipe, spec)
        backbone = build_backbone(recipe.backbone.name, recipe.backbone.options, spec)
        if recipe.pretext is not None:
            pretexts[recipe.pretext.name](recipe.pretext.options, backbone)


def test_every_pretext_has_a_recipe_per_data_set():
    texts = [name for name in pretexts if pretexts[name].reads is TextSpec]
    assert len(texts) >= 4
    for name in texts:
        assert any(load(path).pretext.name == name for path in RECIPES.glob(f"text/{name}-*.yaml"))
    images = [name for name in pretexts if pretexts[name].reads is ImageSpec]
    assert len(images) >= 8
    for name in images:
        for data in ("cifar10", "imagenet"):
            recipe = f"{'igpt' if name == 'pixels' else name}-{data}.yaml"
            assert load(RECIPES / "image" / recipe).pretext.name == name


CLAIM = """\
number: 1
title: An MLP beats the mean
says: ["a sentence"]
source: a test
otherwise: too few steps
variants:
  small:
    minutes: 1
    sweep: sweep.yaml
    inequalities:
      - {greater: [mlp, scratch, digits, 10 %], lesser: 5}
      - greater: [pixels, logistic-regression, digits, 10 %]
        lesser: [mlp, scratch, digits, 10 %]
        reported: true
  large:
    minutes: 99
    measure: convolution
    inequalities: [{greater: 1, lesser: [hard attention, 3 x 3, inside]}]
"""
CLAIM_SWEEP = """\
name: claimed
seeds: [0, 1, 2]
base:
  backbone: {name: mlp, width: 16, depth: 1}
  data: {name: digits, size: 8}
  finetune: {steps: 20, batch: 32, optimizer: adamw, lr: 0.01}
  evaluate: {digits: {protocols: [scratch, probe], labels: [0.1, 1.0]}}
rows:
  mlp: {}
  pixels: {backbone: pixels, evaluate.digits.protocols: [logistic-regression]}
"""


def test_claims_run_missing_cells_and_report_verdicts(folder, sslrun):
    claims = folder / "recipes/claims"
    claims.mkdir(parents=True)
    (folder / "sweep.yaml").write_text(CLAIM_SWEEP)
    (claims / "mean.yaml").write_text(CLAIM.replace("sweep.yaml", "../../sweep.yaml"))
    listed = sslrun("claims", "--list", cwd=folder).stdout
    assert re.search(
        r"1\s+mean\s+An MLP beats the mean\s+small 1 min \(a guess\), large 99 min \(a guess\)",
        listed,
    )
    wrong = sslrun("claims", "-o", "claims.txt", cwd=folder, code=2).stderr
    assert "claims.txt: verdicts are written to files that end in .md or .json" in wrong
    assert not (folder / "runs").exists()
    first = sslrun("claims", "-o", "claims.md", cwd=folder).stdout
    assert "1. An MLP beats the mean: supported" in first
    assert re.search(
        r"mlp · scratch · digits · 10 % > 5 \(.*\): "
        r"supported: \+[\d.]+ \[.*\] over 3 seeds \(t interval\)",
        first,
    )
    assert "For a larger budget: sslrun claims mean --budget 99" in first
    text = (folder / "claims.md").read_text()
    assert "`sslrun claims -o claims.md`" in text
    assert "| 1 | [An MLP beats the mean](#mean) | supported |" in text
    runs = sorted(folder.glob("runs/claimed/*/result.json"))
    assert len(runs) == 6  # only the cells that the inequalities name
    times = [path.stat().st_mtime_ns for path in runs]
    output = sslrun("claims", "mean", cwd=folder).stdout
    assert "claimed · digits" in output  # the table is printed if a claim is named
    again = sslrun("claims", "mean", "--budget", "120", "--json", cwd=folder).stdout
    (large,) = json.loads(again)
    assert (large["variant"], large["verdict"], large["larger"]) == ("large", "supported", None)
    assert [path.stat().st_mtime_ns for path in runs] == times
