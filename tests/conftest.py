"""Shared fixtures: few threads, no network, and the command line in forked processes."""

import itertools
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # other workers use the other cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


SLOW = {
    "test_the_printed_schema_is_one", "gives_the_same_trajectories[skew",
    "gives_the_same_trajectories[contrastive", "gives_the_same_trajectories[data",
    "test_browser.py", "test_a_page_of_many_runs", "test_damaged_unfinished_and_older_runs",
    "test_order_learns_where_frames_are_numbered", "test_a_backbone_that_decides_is_rolled_out",
    "test_failures.py", "test_errands.py", "test_text.py::test_a_corpus_is_divided_by_documents",
    "test_text.py::test_a_signal_stops_the_reading_of_a_corpus_at_once", "test_torchrun.py",
    "test_golden.py", "test_device.py", "test_check.py", "test_export.py", "test_pretrain.py",
    "test_ranks.py", "test_shifts.py", "test_sweep.py", "test_transfer.py", "test_watch.py",
    "test_distributed.py", "test_an_interrupted_pretraining_continues_to_the_same_bits",
    "test_kill_9_loses", "test_a_sweep_shares_runs", "test_help_show_and_check",
    "test_user_errors_are_one_line_and_write_no_result", "test_pretrain_then_every_protocol",
    "test_claims_run_missing_cells_and_report_verdicts",
    "test_an_error_before_pretraining_is_one_line", "test_recipes_are_valid",
    "test_sweeps_are_valid", "test_every_pretext_learns_on_every_backbone",
    "test_denoising_input_and_target_rebuild_the_text",
    "test_documents_attend_to_each_other_only_with_cross_documents",
    "test_training_a_tokenizer_is_deterministic_across_processes",
    "test_the_same_seed_gives_the_same_texts_and_splits_are_disjoint",
    "test_collapse_is_named_by_its_kind[512]",
    "test_features_of_ten_points_are_not_called_collapsed",
    "test_policies_have_their_documented_parameters",
    "test_an_unavailable_set_is_an_empty_cell_with_its_reason",
    "test_bf16_gradients_of_a_resnet_on_one_pixel_images_are_deterministic",
    "test_bert_equals_transformers_bert_and_converts_both_ways", "test_resnet_equals_torchvisions",
    "test_with_unequal_lengths_a_few_steps_are_counted_and_others_scaled",
    "test_a_killed_pretraining_on_text", "test_two_processes_learn",
    "test_naming_a_set_and_reading_a_recipe_import",
    "test_a_measurement_has_the_cells_that_its_claim_names", "test_a_plot_is_drawn",
    "test_a_weight_file_without_a_tokenizer", "test_every_number_is_shown_as_published",
    "[random-forest]", "test_every_published_table_can_be_compared_with_itself",
    "test_few_shot_on_images_starts_at_one_per_class",
    "test_motion_blur_is_smooth_in_larger_images_too",
    "test_lpft_without_a_learning_rate_is_its_probe[resnet",
    "test_lpft_without_a_learning_rate_is_its_probe[mlp", "test_moving_batch_statistics",
    "test_intervals_have_their_nominal_coverage[10",
    "test_one_feature_ends_above_the_bound", "test_a_pretext_task_in_a_file_of_ones_own",
    "test_the_wheel_holds_the_recipes", "test_the_masked_language_model_gives_transformers_logits",
    "test_a_refit_", "test_a_folder_of_images_becomes_a_recipe_that_runs",
    "test_a_table_of_texts_becomes_a_recipe_that_runs", "test_every_readout_learns",
    "test_evaluation_equals_resize_and_center_crop", "test_each_claim_can_be_run",
    "test_boxes_are_distributed_as_those_of_torchvision",
    "test_without_centering_or_sharpening_it_collapses",
    "test_dino.py::test_a_resumed_run_equals_one_never_stopped_bit_for_bit",
    "test_targets_that_learn_collapse_and_the_collapse_is_named",
    "test_a_probe_with_norm_scores_and_its_head_starts_lpft",
    "test_attend.py::test_mistakes_are_one_line",
    "test_track.py::test_the_command_tracks_by_an_untrained_recipe",
    "test_every_image_has_a_picture_and_all_are_on_the_contact_sheet",
    "test_a_recipe_gives_its_weights_and_its_test_split",
    "test_training_goes_below_the_floor_on_held_out_images", "test_layers.py", "test_attentive.py",
    "test_completions_keep_the_upper_half", "test_pictures_of_the_masked_order",
    "test_keep.py", "test_search.py",
    "test_four_channels_of_16_bits_from_pretraining_to_a_probe",
    "test_two_processes_have_the_loss", "collapse_and_the_collapse_is_named",
    "all_images_share_a_prototype_and_the_collapse_is_named",
    "test_fine_tuning_on_text_never_waits[", "test_pretraining_on_text_never_waits[",
    "test_libraries.py", "test_push.py", "test_load.py",
    "test_zero_shot.py::test_a_trained_language_model_prefers_right_sentences",
    "test_practice_from_pretraining_to_a_picture", "test_a_practice_that_was_killed",
    "test_practice.py::test_the_same_run_twice", "test_practice.py::test_bad_input_is_one_line",
    "test_a_contrastive_critic_learns_who", "test_td3_learns_to_move",
    "test_check_prints_the_budget",
    "test_memorized_trajectories_are_replayed", "test_random_and_expert_returns_are_the_reference",
    "test_it_learns_the_expert", "test_the_same_recipe_gives_the_same_trajectories",
    "test_pretraining_reports_losses_and_floor_and_saves_its_tokenizer",
    "test_causal_bert_equals_transformers_decoder",
    "test_the_floor_is_the_entropy_of_masked_categories",
    "test_other_files_of_pytorch_geometric_are_one_line",
    "test_moving_digits_are_the_same_films_each_time",
    "test_lpft_without_a_learning_rate_is_its_probe[vit",
    "test_checkpoints_of_other_libraries_and_sizes_load",
    "test_a_bag_of_words_does_not_predict_the_label", "test_moco_with_split_batch_norm",
    "test_every_pretext_has_a_recipe_per_data_set", "test_the_flow_is_the_limit",
    "test_every_protocol_accepts_every_readout", "test_films_in_which_nothing_moves",
    "test_films_are_held_out_whole",
    "test_training_resumes_exactly", "test_points_of_drawn_films_lie_on_their_objects",
    "test_it_learns_colors_that_follow_from_lightness", "test_it_learns_to_reconstruct",
    "test_clips_are_cut_around_fish_with_masks_that_move_with_them",
    "test_streamed_films_give_the_clips_of_stored_ones[1]",
    "test_what_it_writes_is_more_likely_than_perturbed_texts",
    "test_it_learns_to_write_its_training_texts",
    "test_fine_tuning_starts_from_the_decoder_of_the_pretext_task",
    "test_a_small_beta_keeps_all_units_and_a_large_one_collapses",
    "test_it_learns_to_return_and_is_healthy", "test_cells_that_know_their_place_collapse",
    "test_it_learns_to_find_colors_below_its_floor",
    "acceptance/test_graphs.py", "test_killed_fine_tuning", "test_mutated_recipes",
    "test_fine_tuning_on_pictures_learns_the_position",
    "test_a_sweep_survives_", "requeues_itself_at_its_time_limit",
    "requeued_by_slurm_continues", "test_a_pretraining_gives_the_bits",
    "test_no_worker_is_started_or_submitted", "test_a_killed_worker_is_reported",
    "test_a_run_that_kill", "test_a_worker_without_a_run_to_take",
    "test_a_processed_data_set_is_read", "test_attention_learns_maps_from_eigenvectors",
    "test_published_sets_have_their_molecules", "data/graph/test_graphs.py",
    "test_graphs_of_other_libraries_are_no_code", "test_models_of_strangers_bring_no_code",
    "test_parquet_of_an_object_store_equals_the_same_file_here",
    "test_a_pretraining_whose_weights_are_gone_or_damaged_is_made_again",
    "training/test_shard.py", "benchmarks/test_gpu.py",
    "test_no_file_imports_from_a_higher_floor", "report/test_texts.py", "errands/test_protocol.py",
    "test_lpft_without_a_learning_rate_is_its_probe[elmo", "images_never_waits[dino]",
    "test_help_lists_and_tables_of_folders_do_not_import_torch",
    "test_a_table_is_never_held_in_memory", "test_weighted_knn_equals_the_vote_of_wu_et_al",
    "test_bad_sentences_of_the_small_world_are_impossible",
    "test_a_transformers_encoder_loads_from_a_folder",
    "test_a_computing_thread_does_not_block_the_reports",
    "test_an_interrupted_extension_ends_with_the_same_bits", "test_runs_record_their_costs",
    "test_many_episodes_at_once_are_those_one_by_one[point]",
    "test_an_unknown_reference_asks_for_one", "test_greedy_decoding_equals_a_beam_of_one",
    "test_the_strength_with_the_lowest_score_is_chosen_if_lower_is_better",
    "test_every_text_is_escaped_and_the_only_script_is_the_pages_own",
    "test_streamed_batches_equal_those_of_the_tensor",
    "expected_statistic_whatever_their_number[64]",
    "test_a_failed_request_is_repeated", "test_shards_are_never_held_in_memory",
}  # fmt: skip
"""Substrings of the names of tests that take more than a second; `make fast` skips them.

`pytest --durations=40` lists the candidates.
"""


COLLECTED = pytest.StashKey[list[str]]()


@pytest.hookimpl(tryfirst=True)  # before -k and -m deselect tests
def pytest_collection_modifyitems(config, items):
    config.stash[COLLECTED] = [item.nodeid for item in items]
    is_slow = re.compile("|".join(map(re.escape, SLOW))).search
    for item in items:
        if is_slow(item.nodeid):
            item.add_marker(pytest.mark.slow)
    # Tests that wait for Slurm and Ray first: at the end, the other worker would have nothing left.
    items.sort(key=lambda item: "tests/launch/" not in item.nodeid)


@pytest.fixture
def unmatched_slow_names(request):
    """Return the entries of SLOW that match no test. Needs the whole suite, else skips."""
    collected = request.config.stash[COLLECTED]
    files = {request.config.rootpath / node_id.partition("::")[0] for node_id in collected}
    if not files.issuperset(Path(__file__).parent.rglob("test_*.py")):
        pytest.skip("only a part of the test files is collected")
    return sorted(part for part in SLOW if not any(part in node_id for node_id in collected))


class Completed(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


class Running:
    """A command that was started, with its output in files."""

    def __init__(self, pid, poll, streams):
        """`poll` returns the exit code, None while the command runs."""
        self.pid, self.poll, self.streams = pid, poll, streams

    def wait_for(self, folder, pattern):
        """Wait until a file in `folder` matches `pattern`, or the command has ended."""
        while self.poll() is None and not list(folder.glob(pattern)):
            time.sleep(0.002)

    def finish(self):
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return Completed(code, *(stream.read_text() for stream in self.streams))


@pytest.fixture(scope="session")
def fork_socket():
    """The path of the socket at which tests/forks.py listens on Linux."""
    with tempfile.TemporaryDirectory(prefix="forks", dir="/tmp") as folder:  # must be short
        yield Path(folder) / "socket"


@pytest.fixture(scope="session")
def forking_python(start_command, fork_socket, tmp_path_factory):
    """The path of a Python whose `python -m sslrun` runs in a process forked by tests/forks.py.

    Its folder is for PYTHONPATH: there, Python names this one as its executable.
    """
    if sys.platform != "linux":
        return Path(sys.executable)
    folder = tmp_path_factory.mktemp("python")
    python = folder / "python"
    client = Path(__file__).with_name("client.py").read_text()
    names = f"PYTHON = {sys.executable!r}\nSOCKET = {str(fork_socket)!r}\n"
    python.write_text(f"#!{sys.executable} -SE\n{names}{client}")
    python.chmod(0o755)
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.executable = {str(python)!r}\n")
    return python


@pytest.fixture(scope="session")
def start_command(tmp_path_factory, fork_socket):
    """Return `start(arguments, folder, environment)`, which starts `sslrun ARGUMENTS`.

    On Linux the processes are forked from one that has already imported torch (tests/forks.py),
    because the import takes longer than most commands. On other systems they start from scratch.
    """
    folder, numbers = tmp_path_factory.mktemp("streams"), itertools.count()

    def streams():
        number = next(numbers)
        return tuple(folder / f"{number}.{name}" for name in ("out", "err"))

    if sys.platform != "linux":

        def start(arguments, cwd, env):
            stdout, stderr = streams()
            command = [sys.executable, "-m", "sslrun", *arguments]
            with stdout.open("w") as out, stderr.open("w") as err:
                process = subprocess.Popen(command, cwd=cwd, env=env, stdout=out, stderr=err)
            return Running(process.pid, process.poll, (stdout, stderr))

        yield start
        return

    root = Path(__file__).parents[1]
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(fork_socket))
    listener.listen()
    file = listener.fileno()
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", Path(__file__).with_name("forks.py"), str(file)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[file],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )  # fmt: skip

    listener.close()

    def ask(request):
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    def fork(arguments, cwd, env):
        stdout, stderr = streams()
        request = {
            "arguments": arguments,
            "cwd": str(cwd),
            "env": env,
            "stdout": str(stdout),
            "stderr": str(stderr),
        }
        pid, code = ask(request), None

        def poll():
            nonlocal code
            code = ask(pid) if code is None else code
            return code

        return Running(pid, poll, (stdout, stderr))

    yield fork
    server.stdin.close()
    server.wait(timeout=30)


@pytest.fixture
def start_sslrun(start_command):
    """Start `sslrun ARGUMENTS` as a user does, with output to files."""

    def start(*arguments, cwd, **environment):
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        return start_command([*map(str, arguments)], cwd, env)

    return start


@pytest.fixture
def start_ranks(start_sslrun):
    """Start `sslrun ARGUMENTS` in two processes that train together, as torchrun does."""

    def start(*arguments, cwd):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            start_sslrun(*arguments, cwd=cwd, **group, RANK=rank, LOCAL_RANK=rank)
            for rank in ("0", "1")
        ]

    return start


@pytest.fixture(scope="session")
def run_two():
    """Return `run_two(function, arguments)`: call function(rank, *arguments) in two processes.

    They are forked from a process that has already imported torch and sslrun, once.
    """
    modules = ["sslrun.pretexts", "sslrun.training.loop", "torch.distributed.fsdp", "torch._dynamo"]
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(modules)

    def run(function, arguments):
        torch.multiprocessing.start_processes(
            function, arguments, nprocs=2, start_method="forkserver"
        )

    return run


@pytest.fixture
def sslrun(start_sslrun):
    """Run `sslrun ARGUMENTS` as a user does, with output to files, and check the exit code."""

    def run(*arguments, cwd, code=0, **environment):
        done = start_sslrun(*arguments, cwd=cwd, **environment).finish()
        assert done.returncode == code, done.stderr
        assert "\x1b" not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run
