"""Slurm: options, errors, and a cluster of three nodes on this machine that requeues jobs."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from sslrun.errors import UserError
from sslrun.launch import Workers, build
from sslrun.launch.slurm import minutes_of
from sslrun.stages.sweep import submit

pytest.importorskip("submitit", reason="submitit is not installed")
DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("one", "two", "three")


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90m", 90), ("4h", 240), ("2d", 2880), ("12:30:00", 750), ("1-00:00:01", 1441)],
)
def test_time_limits(text, minutes):
    assert minutes_of(text) == minutes


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Put an sbatch on the PATH that runs a script; returns the file it copies its job to."""
    copy = tmp_path / "job"

    def install(script):
        for name in ("sbatch", "srun"):
            path = tmp_path / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"#!/bin/sh\ncp $1 {copy}\n{script}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        return copy

    return install


def test_slurm_receives_an_array_that_is_requeued(sbatch, tmp_path):
    job = sbatch("echo Submitted batch job 17")
    workers = Workers(("sweep", "a.yaml"), 40, "auto", tmp_path / "logs", "mine")
    options = ["partition=gpu", "time=2d", "cpus=8", "memory=1.5", "sbatch=--qos=low --exclusive"]
    assert build("slurm", options).submit(workers).startswith("Submitted Slurm job 17; logs: ")
    lines = set(job.read_text().splitlines())
    expected = {
        "array=0-39%40", "partition=gpu", "time=2880", "gpus-per-node=1", "ntasks-per-node=1",
        "cpus-per-task=8", "mem=1536M", "qos=low", "exclusive", "requeue", "signal=USR2@120",
    }  # fmt: skip
    assert {f"#SBATCH --{option}" for option in expected} <= lines
    assert len(list((tmp_path / "logs").glob("17_*_submitted.pkl"))) == 40


def test_a_pretraining_gets_a_task_per_gpu_of_all_nodes(sbatch, tmp_path):
    job = sbatch("echo Submitted batch job 17")
    workers = Workers(("pretrain", "a.yaml"), 1, "auto", tmp_path / "logs", "mine", is_sweep=False)
    build("slurm", ["nodes=2", "gpus=8"]).submit(workers)
    lines = set(job.read_text().splitlines())
    expected = {"nodes=2", "gpus-per-node=8", "ntasks-per-node=8"}
    assert {f"#SBATCH --{option}" for option in expected} <= lines
    assert not any("array" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["tme=3h"], "-E tme=3h: unknown option of 'slurm'. Did you mean 'time'?"),
        (["time=2m"], "-E time=2m: should be above 120 s, before which the work"),
        (["sbatch=--qos=low --array=3"], "--array is set by sslrun: leave it out"),
        (["time=3"], "-E time=3: write a time as 30m, 4h, 2d,"),
        (["partition"], "-E partition: an option of an engine is written KEY=VALUE"),
        (["gpus=-1"], "-E gpus=-1: Input should be greater than or equal to 0"),
        (["gpus=0.5"], "-E gpus=0.5: should be a whole number"),
        (["gpus=2"], "-E gpus=2: a worker of a sweep uses one GPU"),
        (["nodes=2"], "-E nodes=2: a worker of a sweep uses one node"),
        (["sbatch=-p gpu"], "-E sbatch=-p gpu: write each option as --name=value, not '-p'"),
        (["sbatch='"], "-E sbatch=': No closing quotation"),
        (["partition=gpo"], "sbatch refused: no such partition: gpo; it failed"),
    ],
)
def test_mistakes_are_one_line(options, message, sbatch, tmp_path, capfd):
    sbatch("echo 'sbatch: error: no such partition: gpo' >&2; echo 'it failed' >&2; exit 1")
    workers = Workers(("sweep", "a.yaml"), 2, "cpu", tmp_path / "logs", "mine")
    with pytest.raises(UserError) as error:
        build("slurm", options).submit(workers)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_a_missing_sbatch_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="no sbatch on this machine; use a login node"):
        build("slurm", ()).submit(Workers((), 2, "cpu", tmp_path, "mine"))


CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
KillWait=2
NodeName=one NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[1]} CPUs=1
NodeName=two NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[2]} CPUs=1
NodeName=three NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[3]} CPUs=1
PartitionName=main Nodes=ALL Default=YES
"""
"""Three nodes on this machine. A requeued job waits for `cred_expire` seconds, by default 120."""


def _free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def cluster():
    """Run Slurm's daemons in a folder of their own, and end them and all jobs afterwards.

    Other clusters may run on this machine: folder, ports and jobs are this one's own.
    """
    missing = [name for name in DAEMONS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons need root")
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # a socket's path must be short
    (folder / "state").mkdir()
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o600)
    host = os.uname().nodename.partition(".")[0]
    configuration = CONFIGURATION.format(
        host=host, folder=folder, ports=_free_ports(1 + len(NODES))
    )
    (folder / "slurm.conf").write_text(configuration)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    files = {"key-file": "key", "socket": "munge", "pid-file": "munge.pid", "log-file": "munge.log"}
    munge = [f"--{option}={folder / name}" for option, name in files.items()]
    commands = [
        ["munged", "--foreground", "--force", f"--seed-file={folder / 'seed'}", *munge],
        ["slurmctld", "-D"],
        *(["slurmd", "-D", "-N", name] for name in NODES),
    ]
    daemons = []
    try:
        for command in commands:
            with open(folder / f"{len(daemons)}.log", "w") as log:
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
            end = time.monotonic() + 60
            while command[0] == "munged" and not (folder / "munge").exists():
                assert time.monotonic() < end, (folder / "0.log").read_text()
                time.sleep(0.05)
        end = time.monotonic() + 60
        while _ask("sinfo", "-hN", "-o%T").count("idle") < len(NODES):
            assert time.monotonic() < end, (folder / "1.log").read_text()[-2000:]
            time.sleep(0.25)
        yield
    finally:
        _ask("scancel", "--user=root")
        end = time.monotonic() + 10
        while _ask("squeue", "-h") and time.monotonic() < end:
            time.sleep(0.25)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=10)
        shutil.rmtree(folder, ignore_errors=True)
        monkeypatch.undo()


def _ask(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout


def _wait_for(condition, seconds=300.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, _ask("squeue")
        time.sleep(0.1)


RECIPE = """\
name: slow
backbone: {name: mlp, width: 16, depth: 1}
data: {name: digits, size: 8}
pretext: slow
pretrain: {steps: 300, batch: 32, precision: fp32}
"""
PLUGIN = """\
import os, time
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.rotation import Rotation

@pretexts.register("slow")
class Slow(Rotation):
    version = 1

    def views(self, batch, generator):
        if "SLURM_JOB_ID" in os.environ and "SLURM_RESTART_COUNT" not in os.environ:
            time.sleep(0.25)  # until Slurm requeues the job
        return super().views(batch, generator)
"""
BATCH = """\
#!/bin/sh
#SBATCH --signal=B:USR1@3540 --time=120 --requeue --open-mode=append --output=log
exec {python} -m sslrun {command} --runs=own
"""
"""A script of one's own. Slurm signals it 59 minutes before its time limit."""


COMMAND = "pretrain slow.yaml --import=slow.py --device=cpu"


@pytest.fixture(scope="module")
def slow(tmp_path_factory, start_command):
    """The folder of a pretraining that is slow until Slurm requeues it, and its weights."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "slow.yaml").write_text(RECIPE)
    (folder / "slow.py").write_text(PLUGIN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = start_command([*COMMAND.split(), "--runs=expected"], folder, environment).finish()
    assert done.returncode == 0, done.stderr
    return folder, _weights(folder / "expected")


def _weights(runs):
    """The bytes of the only weights in a folder of runs; None if it holds none."""
    paths = list(runs.glob("slow/pretrain-*/backbone.safetensors"))
    return paths[0].read_bytes() if paths else None


def _steps(runs):
    """The steps that logs in a folder of runs record."""
    logs = [path.read_text() for path in runs.glob("slow/pretrain-*/metrics.jsonl")]
    return [json.loads(line)["step"] for log in logs for line in log.splitlines()]


def _is_done(runs):
    return bool(list(runs.glob("slow/pretrain-*/result.json")))


def _limit(job, minutes):
    subprocess.run(["scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}"], check=True)


@pytest.fixture(scope="module")
def own(cluster, slow):
    """The folder of a job of one's own, and a thread that waits until it has been requeued.

    The job reaches its time limit while other tests run: Slurm looks only twice a minute for jobs
    whose limit is near.
    """
    folder, _ = slow
    (folder / "job").write_text(BATCH.format(python=sys.executable, command=COMMAND))
    job = subprocess.check_output(["sbatch", "--parsable", "job"], cwd=folder, text=True).strip()

    def reach_the_limit():
        _wait_for(lambda: len(_steps(folder / "own")) > 2)
        _limit(job, minutes=59)
        _wait_for(lambda: "is requeued" in (folder / "log").read_text())
        _limit(job, minutes=120)  # it waits before it runs again

    thread = threading.Thread(target=reach_the_limit)
    thread.start()
    yield folder, thread
    thread.join()


@pytest.mark.usefixtures("cheap_workers")
def test_a_sweep_survives_a_killed_worker_and_a_requeued_one(own, tiny, expected, waiting):
    """One worker is killed; the other is requeued as at a time limit, and does the rest."""

    def logs():
        return "".join(path.read_text() for path in tiny.workers.logs.glob("*_log.*"))

    engine = build("slurm", ["time=10m"])
    assert submit([tiny.plan], tiny.context, engine, tiny.workers).startswith("Submitted Slurm job")
    (killed, _), _ = tiny.wait_for_held(2)
    _wait_for(lambda: len(list(waiting.parent.glob("waiting-*"))) == 2)  # both train
    os.kill(int(killed.rpartition(":")[2]), signal.SIGKILL)
    _wait_for(lambda: "RuntimeError: killed by SIGKILL" in logs())
    _ask("scancel", "--signal=USR2", "--name=sslrun")
    _wait_for(lambda: "Caught signal SIGUSR2" in logs())
    waiting.unlink()
    _wait_for(lambda: all(job.run.finished for job in tiny.plan.jobs))
    assert "stopped by SIGTERM" in logs()
    assert "Requeued job" in logs()
    assert tiny.outcome == expected


@pytest.mark.usefixtures("cheap_workers")
def test_a_pretraining_that_is_requeued_by_slurm_continues(own, slow, sslrun):
    folder, expected = slow
    runs = folder / "submitted"
    sslrun(*COMMAND.split(), "--runs=submitted", "--engine=slurm", "-Etime=10m", cwd=folder)
    _wait_for(lambda: len(_steps(runs)) > 2)
    (job,) = _ask("squeue", "-h", "--name=sslrun", "--states=running", "-o%A").split()
    _ask("scontrol", "requeue", job)
    _wait_for(lambda: _is_done(runs))
    logs = "".join(path.read_text() for path in (runs / "slow" / "workers").glob("*_log.*"))
    assert "stopped by SIGTERM; everything finished is saved" in logs
    assert "continues after step" in logs
    assert _weights(runs) == expected


def test_a_job_of_ones_own_requeues_itself_at_its_time_limit(own, slow):
    (folder, requeued), (_, expected) = own, slow
    requeued.join()
    _wait_for(lambda: _is_done(folder / "own"))
    log = (folder / "log").read_text()
    assert "stopped by SIGUSR1; everything finished is saved" in log
    assert "is requeued, and continues there" in log
    assert "continues after step" in log
    assert _weights(folder / "own") == expected
