"""What every test shares: few threads, no network, and the command line in processes that start at once."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # the cores are taken by other workers
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


SLOW = {
    "test_failures.py", "test_errands.py", "test_text.py::test_a_corpus", "test_torchrun.py", "test_golden.py", "test_device.py",
    "test_check.py", "test_export.py", "test_pretrain.py", "test_ranks.py", "test_shifts.py", "test_sweep.py",
    "test_transfer.py", "test_watch.py", "test_distributed.py",
    "test_a_killed_pretraining_continues", "test_kill_9_loses", "test_a_sweep_shares_runs", "test_help_show_and_check",
    "test_mistakes_leave_nothing", "test_pretrain_then_every_protocol", "test_claims_run_what_is_missing",
    "test_a_mistake_before_pretraining", "test_recipes_are_valid", "test_sweeps_are_valid",
    "test_every_pretext_learns_on_every_backbone",
    "test_input_and_target_make_the_text_again", "test_documents_see_each_other_only",
    "test_a_trained_one_is_the_same_in_every_process", "test_the_same_seed_tells_the_same",
    "test_collapse_names_what_is_wrong[512]", "test_features_that_know_ten_classes", "test_policies_do_what_they_say",
    "test_a_set_that_cannot_be_had_is_an_empty_cell", "test_naming_a_set_imports_nothing_heavy",
    "test_gradients_of_a_resnet_on_images_of_one_place", "test_bert_is_transformers_bert", "test_resnet_is_torchvisions",
    "test_parameter_counts_are_the_published_ones[vit-base", "test_where_lengths_differ_a_few_steps_are_counted",
    "test_a_killed_pretraining_on_text", "test_two_processes_learn", "test_a_recipe_is_read_without_importing",
    "test_the_cells_of_a_measurement", "test_a_plot_is_drawn", "test_a_weight_file_without_a_tokenizer",
    "test_every_number_of_a_table_is_shown", "[random-forest]", "test_every_published_table_stands_beside",
    "test_images_from_one_a_class_on", "test_motion_in_a_larger_image", "test_lpft_without_a_learning_rate_is_its_probe[resnet", "test_lpft_without_a_learning_rate_is_its_probe[mlp",
    "test_moving_batch_statistics", "test_intervals_cover_the_truth_as_often_as_they_say[10",
}  # fmt: skip
"""Parts of the names of tests that take more than a second of one core: `make fast` leaves them
out.

`pytest --durations=40` says which belong here.
"""


def pytest_collection_modifyitems(items):
    for item in items:
        if any(part in item.nodeid for part in SLOW):
            item.add_marker(pytest.mark.slow)


class Completed(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def run_command(tmp_path_factory):
    """Run `sslrun ARGUMENTS` in a process of its own: `run_command(arguments, folder, environment)`.

    On Linux the processes are forked from one that has imported torch already (tests/forks.py):
    importing it takes longer than most commands. Elsewhere each is a new process.
    """
    if sys.platform != "linux":

        def start(arguments, cwd, env):
            done = subprocess.run([sys.executable, "-m", "sslrun", *arguments], cwd=cwd, env=env, capture_output=True, text=True)  # fmt: skip
            return Completed(done.returncode, done.stdout, done.stderr)

        yield start
        return

    root, numbers = Path(__file__).parents[1], itertools.count()
    streams = tmp_path_factory.mktemp("streams")
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", Path(__file__).with_name("forks.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )  # fmt: skip

    def fork(arguments, cwd, env):
        number = next(numbers)
        stdout, stderr = (streams / f"{number}.{name}" for name in ("out", "err"))
        request = {
            "arguments": arguments,
            "cwd": str(cwd),
            "env": env,
            "stdout": str(stdout),
            "stderr": str(stderr),
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return Completed(code, stdout.read_text(), stderr.read_text())

    yield fork
    server.stdin.close()
    server.wait(timeout=30)


@pytest.fixture
def sslrun(run_command):
    """Run `sslrun ARGUMENTS` as a user does, with output to files, and check the exit code; returns its output."""

    def run(*arguments, cwd, code=0, **environment):
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        done = run_command([*map(str, arguments)], cwd, env)
        assert done.returncode == code, done.stderr
        assert "\x1b" not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run
