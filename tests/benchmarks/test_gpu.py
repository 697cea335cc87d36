"""The GPU benchmark measures its rows with tiny networks, and reports what fails."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
ROWS = ["simclr-cifar10", "vit-small, multi-crop", "bert-base-128", "fine-tune vit-base", "probe"]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    yield gpu
    for name in ("gpu", "blocks"):
        del sys.modules[name]


def test_rows_are_measured_and_a_failing_one_is_reported(gpu, tmp_path, monkeypatch):
    broken = gpu.Row("simclr-cifar10", 512, quick=("backbone.channels=0",))
    monkeypatch.setitem(gpu.ROWS, "resnet50", broken)
    output = tmp_path / "gpu"
    gpu.main(["--device", "cpu", "--quick", "--output", str(output), "--rows", "resnet50", *ROWS])
    failed, *rows = json.loads(output.with_suffix(".json").read_text())["rows"]
    assert failed["row"] == "resnet50"
    assert "channels" in failed["error"]
    assert [row["row"] for row in rows] == ROWS
    for row in rows:
        assert row["rate"] > 0
        assert row["ratio"] == pytest.approx(row["rate"] / row["plain"])
    for row in rows[:-1]:
        assert tuple(row["phases"]) == gpu.PHASES
        assert sum(row["phases"].values()) >= 0.99 * row["step_seconds"]
        assert 0 < row["share"] == pytest.approx(row["tflops"] * 1e12 / row["matrix_rate"])
    simclr = rows[0]
    examples = 200 * (50_000 // 512) * 512
    assert simclr["run_seconds"] == pytest.approx(
        simclr["startup_seconds"] + examples / simclr["rate"]
    )
    table = output.with_suffix(".md").read_text().splitlines()
    assert len(table) == 4 + len(ROWS) + 1
