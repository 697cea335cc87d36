"""Engines that start the workers of sweeps: this machine, Slurm, Ray."""

from sslrun.launch import local, ray, slurm
from sslrun.launch.engine import Crew, End, Engine, Workers, build, end_with_parent, engines

__all__ = [
    "Crew",
    "End",
    "Engine",
    "Workers",
    "build",
    "end_with_parent",
    "engines",
    "local",
    "ray",
    "slurm",
]
