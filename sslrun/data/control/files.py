"""Read trajectories from files: D4RL's HDF5, .npz with the same keys, and folders of Minari."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sslrun.data.control.environments import Environment
from sslrun.data.control.trajectories import Episodes
from sslrun.errors import UserError

KEYS = ("observations", "actions", "rewards", "terminals")
"""Arrays that a file must have; `timeouts` is optional."""


def read_trajectories(path: Path, environment: Environment) -> Episodes:
    """Read the trajectories of a file or folder, which must fit the environment.

    As in the code of Chen et al. 2021, steps after the last end of an episode are left out.

    Raises:
        UserError: the file cannot be read, holds no whole trajectory, or has other shapes than the
            environment; or a package is missing.
    """
    arrays = _read(path)
    states, rewards = np.asarray(arrays["observations"]), np.asarray(arrays["rewards"])
    ends = np.asarray(arrays["terminals"]).astype(bool)
    if "timeouts" in arrays:
        ends = ends | np.asarray(arrays["timeouts"]).astype(bool)
    actions = _as_actions(path, np.asarray(arrays["actions"]), environment)
    columns = {"observations": states, "actions": actions, "rewards": rewards, "terminals": ends}
    for key, column in columns.items():
        if len(column) != len(states):
            raise UserError(f"{path}: {len(column)} {key} for {len(states)} observations")
        if not np.isfinite(column).all():
            raise UserError(f"{path}: {key} are not all finite numbers")
    width = states.size // max(1, len(states))
    if width != environment.state_size:
        raise UserError(
            f"{path}: observations have {width} numbers, but {environment.title} gives "
            f"{environment.state_size}: name the environment that they are from"
        )
    places = np.flatnonzero(ends) + 1
    if not len(places):
        raise UserError(
            f"{path}: no trajectory ends: mark the last step of each in terminals or timeouts"
        )
    return Episodes(
        torch.from_numpy(states[: places[-1]].reshape(-1, width).astype(np.float32)),
        torch.from_numpy(actions[: places[-1]]),
        torch.from_numpy(rewards[: places[-1]].astype(np.float64)),
        torch.tensor([0, *places.tolist()]),
    )


def _as_actions(path: Path, actions: np.ndarray, environment: Environment) -> np.ndarray:
    """Actions (N,) int64 or (N, A) float32. Raises UserError if the environment has others."""
    if environment.is_discrete:
        flat = actions.reshape(len(actions), -1)
        known = np.arange(environment.actions)
        if flat.shape[1] != 1 or not np.isin(flat, known).all():
            raise UserError(
                f"{path}: actions should be whole numbers from 0 to {environment.actions - 1}, the "
                f"actions of {environment.title}"
            )
        return flat[:, 0].astype(np.int64)
    if actions.ndim != 2 or actions.shape[1] != environment.actions:
        raise UserError(
            f"{path}: actions are {actions.shape[1:] or 'single numbers'}, but "
            f"{environment.title} takes vectors of {environment.actions}: name the environment "
            "that they are from"
        )
    return actions.astype(np.float32)


def _read(path: Path) -> dict[str, Any]:
    """Read the arrays of a file or of a Minari folder under D4RL's names."""
    if path.is_dir():
        return _read_minari(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder of trajectories")
    try:
        arrays = _read_npz(path) if path.suffix == ".npz" else _read_hdf5(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read as trajectories: {reason}") from None
    missing = [key for key in KEYS if key not in arrays]
    if missing:
        raise UserError(
            f"{path}: has no {', '.join(missing)}; it holds: {', '.join(arrays) or 'nothing'}"
        )
    return arrays


def _read_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _read_hdf5(path: Path) -> dict[str, Any]:
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path}: needs the package h5py: pip install 'sslrun[control]'") from None
    with h5py.File(path, "r") as file:
        return {key: file[key][:] for key in (*KEYS, "timeouts") if key in file}


def _read_minari(path: Path) -> dict[str, Any]:
    """Read the episodes of a Minari data set's folder, or of the `data` folder in it."""
    try:
        import minari
    except ImportError:
        raise UserError(
            f"{path}: needs the package minari: pip install 'sslrun[control]'"
        ) from None
    folder = path / "data" if (path / "data").is_dir() else path
    try:
        episodes = list(minari.MinariDataset(folder).iterate_episodes())
    except Exception as error:  # minari raises errors of many kinds
        raise UserError(f"{path}: not a folder of a Minari data set: {error!r}") from None
    if not isinstance(episodes[0].observations, np.ndarray):
        raise UserError(f"{path}: observations are not vectors, which is all that is supported")
    ends = [np.arange(len(episode.rewards)) == len(episode.rewards) - 1 for episode in episodes]
    return {
        # An episode holds one observation more than actions: that after its last step.
        "observations": np.concatenate([one.observations[: len(one.rewards)] for one in episodes]),
        "actions": np.concatenate([one.actions for one in episodes]),
        "rewards": np.concatenate([one.rewards for one in episodes]),
        "terminals": np.concatenate(ends),
    }
