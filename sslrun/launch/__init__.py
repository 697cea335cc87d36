"""Launchers of worker commands: processes on this machine, and Slurm arrays."""
