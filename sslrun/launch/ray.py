"""Workers as tasks of a Ray cluster, which may share GPUs and are started again if they die."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from sslrun.errors import UserError
from sslrun.launch.engine import (
    ClusterOptions,
    Crew,
    End,
    Engine,
    Workers,
    describe_exit,
    engines,
)
from sslrun.runs import WORKER

if TYPE_CHECKING:
    from types import ModuleType

CONNECT_SECONDS = 5.0
"""Seconds within which a cluster must answer."""
STOP_SECONDS = 60.0
"""Seconds that workers have to save their work."""
PORT = 6379
"""Ray's default port."""


class RayOptions(ClusterOptions):
    """Options of workers on Ray."""

    address: str | None = None
    """Address of the cluster, as host:port, or "auto" for the one of this machine; default: start
    a cluster of this machine alone."""
    cpus: float = Field(1, ge=0)
    """CPU cores of a worker."""
    retries: int = Field(3, ge=0)
    """How many times a worker that dies, or whose node does, is started again; not after an error
    that it would meet again, such as missing data."""


@engines.register("ray")
class Ray(Engine):
    """Tasks of a Ray cluster, by address or of this machine; the nodes share the runs' folder.

    A fraction of `gpus`, such as 0.25, lets workers share one.
    """

    Options = RayOptions

    def count_devices(self, workers: Workers) -> int:
        return max(1, int(self.options.gpus_of(workers)))

    def start(self, workers: Workers) -> Crew:
        ray = import_ray()
        options = self.options
        gpus = options.gpus_of(workers)
        if gpus > 1:
            workers = replace(workers, arguments=(*workers.arguments, f"--gpus={gpus:g}"))
        _connect(ray, options.address)
        try:
            _check_resources(ray, options, gpus)
        except UserError:
            ray.shutdown()
            raise
        task = ray.remote(
            num_gpus=gpus,
            num_cpus=options.cpus,
            max_retries=0,  # a crew starts workers again itself, so that it can report why
            max_calls=1,
            scheduling_strategy="SPREAD",
        )(run_worker)
        return Tasks(ray, task, workers, options)


class Tasks(Crew):
    """Workers as tasks of Ray."""

    def __init__(self, ray: Any, task: Any, workers: Workers, options: RayOptions) -> None:
        self.ray, self.task, self.workers = ray, task, workers
        self.arguments = workers.command(workers.device, options.idle)
        self.retries = dict.fromkeys(range(1, workers.count + 1), options.retries)
        """Number of a worker -> how many times it may be started again."""
        self.running: dict[Any, tuple[int, str]] = {}
        """Reference of a task -> number and name of its worker."""
        for number in self.retries:
            workers.log(number).write_bytes(b"")
            self._start(number)

    def _start(self, number: int) -> None:
        name = f"{self.workers.names()[number - 1]}-{self.retries[number]}"
        log = str(self.workers.log(number).absolute())
        reference = self.task.remote(self.arguments, name, log, os.getcwd(), _settings())
        self.running[reference] = number, name

    @property
    def is_running(self) -> bool:
        return bool(self.running)

    def ends(self) -> Iterator[End]:
        if not self.running:
            return
        ended, _ = self.ray.wait(list(self.running), num_returns=len(self.running), timeout=0)
        for reference in ended:
            number, name = self.running.pop(reference)
            place, reason, is_mistake = self._result(reference)
            restarts = reason is not None and not is_mistake and self.retries[number] > 0
            if restarts:
                self.retries[number] -= 1
                self._start(number)
            yield End(name, f"worker {number}{place}", reason, restarts)

    def _result(self, reference: Any) -> tuple[str, str | None, bool]:
        """Return where a task ran, as words for its title, and why its worker died.

        The last value is whether that was a mistake, which another worker would repeat.
        """
        try:
            host, code, reason = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            return "", str(error.cause), False
        except self.ray.exceptions.RayError as error:
            first = str(error).strip().partition("\n")[0]
            return "", f"Ray lost it: {first}", False
        return f" (on {host})", reason, code == UserError.exit_code

    def stop(self) -> None:
        references = list(self.running)
        for reference in references:
            self.ray.cancel(reference)
        if references:
            self.ray.wait(references, num_returns=len(references), timeout=STOP_SECONDS)
        self.ray.shutdown()


def run_worker(
    arguments: tuple[str, ...], name: str, log: str, folder: str, settings: dict[str, str]
) -> tuple[str, int, str | None]:
    """Run a worker on a node; return the node's name, the exit code, and why the worker died.

    Raises FileNotFoundError if the node does not share the folder of the runs.
    """
    host = socket.gethostname()
    if not Path(log).exists() or not Path(folder).exists():
        raise FileNotFoundError(
            f"{host} does not see {folder} or {Path(log).parent}: start the sweep in a folder, and "
            "with --runs in one, that all nodes share"
        )
    command = [sys.executable, "-m", "sslrun", *arguments]
    environment = {**os.environ, **settings, WORKER: name}
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    try:
        code = process.wait()
        return host, code, describe_exit(code, Path(log))
    finally:  # cancelled
        process.send_signal(signal.SIGTERM)
        process.wait()


def import_ray() -> ModuleType:
    """Import Ray. Raises UserError if it is not installed."""
    try:
        import ray
    except ImportError:
        raise UserError(
            "--engine ray: ray is not installed; run `pip install 'sslrun[ray]'`"
        ) from None
    return ray


def _connect(ray: Any, address: str | None) -> None:
    """Connect to a cluster, or start one. Raises UserError if the cluster does not answer."""
    if address not in (None, "auto"):
        _check_answer(str(address))
    own = {"include_dashboard": False} if address is None else {}
    try:
        ray.init(
            address=address or "local",
            logging_level="ERROR",
            log_to_driver=False,
            runtime_env={"env_vars": _settings()},
            **own,
        )
    except Exception as error:  # Ray raises many kinds, even Exception itself
        first = str(error).strip().partition("\n")[0]
        where = f"-E address={address}" if address else "--engine ray"
        raise UserError(f"{where}: {first}") from None


def _check_answer(address: str) -> None:
    """Raise UserError if no server answers at an address: Ray itself tries for minutes."""
    host, _, port = address.rpartition("/")[2].partition(":")
    try:
        socket.create_connection((host, int(port or PORT)), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"-E address={address}: no Ray cluster answers there ({error}); start one with "
            "`ray start --head`"
        ) from None


def _check_resources(ray: Any, options: RayOptions, gpus: float) -> None:
    """Raise UserError if no node of a cluster has what one worker needs.

    A cluster that grows by itself starts nodes later; this asks the nodes that are there now.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(node.get("GPU", 0) >= gpus and node.get("CPU", 0) >= options.cpus for node in nodes):
        return
    gpus_there = max(node.get("GPU", 0) for node in nodes)
    cpus_there = max(node.get("CPU", 0) for node in nodes)
    raise UserError(
        f"--engine ray: a worker needs {gpus:g} GPUs and {options.cpus:g} CPU cores, but the nodes "
        f"of the cluster have at most {gpus_there:g} and {cpus_there:g}; choose with -E gpus=N and "
        "-E cpus=N, or use --device cpu"
    )


SETTINGS = ("SSLRUN_", "HF_", "PYTHONPATH", "OMP_NUM_THREADS", "ONEDNN_", "ATEN_")
"""Beginnings of the names of environment variables that workers on other nodes get, too."""


def _settings() -> dict[str, str]:
    """Return the environment variables that a worker shares with this process."""
    return {name: value for name, value in os.environ.items() if name.startswith(SETTINGS)}
