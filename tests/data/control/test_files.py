import sys

import numpy as np
import pytest

from sslrun.data.control.environments import make_environment
from sslrun.data.control.files import read_trajectories
from sslrun.data.source import sources
from sslrun.errors import UserError


def arrays(steps=12, ends=(4, 9)):
    """Two whole trajectories of 5 steps in `point`, and two steps of a third."""
    generator = np.random.default_rng(0)
    return {
        "observations": generator.random((steps, 2)).astype(np.float32),
        "actions": generator.random((steps, 2)).astype(np.float32),
        "rewards": np.arange(steps, dtype=np.float32),
        "terminals": np.isin(np.arange(steps), ends[:1]),
        "timeouts": np.isin(np.arange(steps), ends[1:]),
    }


def write(path, **changes):
    values = {**arrays(), **changes}
    np.savez(path, **{key: value for key, value in values.items() if value is not None})
    return path


POINT = make_environment("point")


def test_npz_and_hdf5_give_the_same_whole_trajectories(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for key, value in arrays().items():
            file[key] = value
        file["infos/goal"] = np.zeros(3)  # further arrays of D4RL are skipped
    read = [
        read_trajectories(path, POINT) for path in (write(tmp_path / "a.npz"), tmp_path / "a.hdf5")
    ]
    for episodes in read:
        assert episodes.starts.tolist() == [0, 5, 10]
        assert episodes.totals.tolist() == [10, 35]
        assert (episodes.actions.numpy() == arrays()["actions"][:10]).all()


@pytest.mark.filterwarnings("ignore:.*is set to None")
def test_a_minari_folder_gives_its_episodes(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    gymnasium = pytest.importorskip("gymnasium")
    from minari.data_collector.episode_buffer import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    buffers = [
        EpisodeBuffer(
            id=number,
            observations=np.full((length + 1, 4), number, dtype=np.float32),
            actions=np.full(length, number),
            rewards=np.ones(length),
            terminations=np.arange(length) == length - 1,
            truncations=np.zeros(length, dtype=bool),
        )
        for number, length in enumerate((3, 5))
    ]
    minari.create_dataset_from_buffers(
        "mine/pole-v0", buffers, env=gymnasium.make("CartPole-v1"), algorithm_name="constant"
    )
    episodes = read_trajectories(
        tmp_path / "mine/pole-v0", make_environment("gymnasium:CartPole-v1")
    )
    assert episodes.lengths.tolist() == episodes.totals.tolist() == [3, 5]
    assert episodes.actions.tolist() == [0] * 3 + [1] * 5
    assert episodes.states[:, 0].tolist() == [0] * 3 + [1] * 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observations": np.zeros((12, 3))}, "observations have 3 numbers, but point gives 2"),
        ({"actions": np.zeros((12, 4))}, r"actions are \(4,\), but point takes vectors of 2"),
        ({"actions": np.zeros(12)}, "actions are single numbers, but point takes vectors of 2"),
        ({"rewards": np.zeros(11)}, "11 rewards for 12 observations"),
        ({"rewards": np.full(12, np.nan)}, "rewards are not all finite"),
        ({"terminals": np.zeros(12), "timeouts": None}, "no trajectory ends"),
        ({"terminals": None}, "has no terminals; it holds: observations, actions, rewards"),
    ],
)
def test_a_file_of_another_form_is_one_line(tmp_path, changes, message):
    path = write(tmp_path / "a.npz", **changes)
    with pytest.raises(UserError, match=message) as error:
        read_trajectories(path, POINT)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_discrete_actions_are_checked(tmp_path):
    states = {"observations": np.zeros((12, 20))}
    good = write(tmp_path / "a.npz", **states, actions=np.arange(12))
    assert read_trajectories(good, make_environment("paths")).actions.tolist() == list(range(10))
    for actions in (np.full(12, 20), np.full(12, 0.5), np.zeros((12, 2))):
        bad = write(tmp_path / "b.npz", **states, actions=actions)
        with pytest.raises(UserError, match="whole numbers from 0 to 19, the actions of paths"):
            read_trajectories(bad, make_environment("paths"))


def test_missing_and_damaged_files_are_one_line(tmp_path):
    pytest.importorskip("h5py")
    with pytest.raises(UserError, match=r"no such file or folder of trajectories"):
        read_trajectories(tmp_path / "none.hdf5", POINT)
    for name in ("a.npz", "a.hdf5"):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(UserError, match=f"{name}: cannot be read as trajectories: .+"):
            read_trajectories(tmp_path / name, POINT)


def test_missing_packages_are_named_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.setitem(sys.modules, "minari", None)
    (tmp_path / "a.hdf5").write_bytes(b"")
    for path, package in ((tmp_path / "a.hdf5", "h5py"), (tmp_path, "minari")):
        with pytest.raises(UserError, match=rf"package {package}: pip install 'sslrun\[control\]'"):
            read_trajectories(path, POINT)


def test_the_source_holds_out_whole_trajectories(tmp_path):
    ends = tuple(range(2, 60, 3))
    values = {
        "observations": np.arange(120, dtype=np.float32).reshape(60, 2),
        "actions": np.zeros((60, 2)),
        "rewards": np.zeros(60),
        "terminals": np.isin(np.arange(60), ends),
    }
    np.savez(tmp_path / "a.npz", **values)
    cls = sources["trajectories"]
    options = {"path": tmp_path / "a.npz", "environment": "point"}
    source = cls(cls.Options(**options))
    train, val = (source.load(split).episodes for split in ("train", "val"))
    assert (len(train), len(val)) == (18, 2)
    together = sorted([*train.states[:, 0].tolist(), *val.states[:, 0].tolist()])
    assert together == values["observations"][:, 0].tolist()
    assert len(cls(cls.Options(**options, validation=0)).load("train").episodes) == 20
