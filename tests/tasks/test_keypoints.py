"""PCK by hand-made cases, points to soft labels and back, and propagation of points."""

import pytest
import torch
import torch.nn.functional as F

from sslrun.data.source import sources
from sslrun.data.specs import VideoSpec
from sslrun.data.video.films import ClipExamples, Shot, StoredFilms
from sslrun.errors import UserError
from sslrun.protocols.propagate import Copy, Propagate, PropagateOptions
from sslrun.tasks.following import FollowingOptions
from sslrun.tasks.keypoints import Keypoints

CPU = torch.device("cpu")
NAN = float("nan")


def task(size=24, frames=4):
    return Keypoints(FollowingOptions(), VideoSpec(size, frames), ())


def points(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def pck(predicted, truth):
    return task().summarize(task().measure_shot(predicted, truth))


def test_pck_by_hand():
    # The box is 30 x 40, so that PCK@0.1 allows 0.1 * 0.6 * 50 = 3 pixels, and PCK@0.2 allows 6.
    truth = points([[0, 0], [30, 40]], [[0, 0], [30, 40]], [[0, 0], [30, 40]])
    assert pck(truth, truth) == {"PCK@0.1": 100, "PCK@0.2": 100}
    predicted = truth.clone()
    predicted[0] = 99  # the first frame is not scored
    predicted[1, 0, 0] = 3
    predicted[2, 0, 0] = 3.1
    predicted[1, 1, 1] = 46.1
    predicted[2, 1] = NAN  # a point that is not predicted is wrong
    assert pck(predicted, truth) == {"PCK@0.1": 25, "PCK@0.2": 50}


def test_absent_points_do_not_count_and_each_point_weighs_the_same():
    box = [[0, 0], [30, 40]]
    truth = points([*box, [5, 5], [NAN, NAN]], [*box, [5, 5], [9, 9]], [*box, [NAN, NAN], [9, 9]])
    predicted = truth.clone()
    predicted[1, 2] = 20  # wrong in the only frame with this point
    predicted[:, 3] = 0  # absent in the first frame
    assert pck(predicted, truth)["PCK@0.1"] == pytest.approx(200 / 3)


def test_points_become_soft_labels_and_come_back():
    place = points([3, 5], [20, 9], [NAN, NAN])
    labels = task().to_soft(place, (24, 32), (24, 32))
    assert labels.shape == (4, 24, 32)
    assert labels[1].argmax() == 5 * 32 + 3
    assert labels[1].sum() == pytest.approx((1 + 2 * 2.718281828**-2) ** 2)
    assert torch.equal(labels[0] > 0, labels[1:].sum(dim=0) == 0)
    found = task().to_place(labels, place, (24, 32))
    assert (found[:2] - place[:2]).abs().max() < 0.2
    assert found[2].isnan().all()
    # Cells of 8 pixels: a point comes back as the center of its cell.
    coarse = task().to_place(task().to_soft(place, (24, 32), (3, 4)), place, (24, 32))
    assert (coarse[:2] - points([3.5, 3.5], [19.5, 11.5])).abs().max() < 1.5


class Identities(torch.nn.Module):
    """A backbone whose features are the one-hot value of each pixel: perfect features."""

    def dense(self, inputs, layer=None):
        values = (inputs[:, 0] * 255).round().long()
        return F.one_hot(values, 256).permute(0, 3, 1, 2).float()


def moving_film(frames=4, size=24):
    """A pattern of distinct pixels that moves right by two pixels a frame, and its points."""
    pattern = torch.arange(1, 101, dtype=torch.uint8).reshape(10, 10)
    pictures = torch.zeros(frames, 3, size, size, dtype=torch.uint8)
    first = points([4, 6], [9, 8], [5, 13])
    places = []
    for time in range(frames):
        pictures[time, :, 5:15, 2 + 2 * time : 12 + 2 * time] = pattern
        places.append(first + points(2 * time, 0))
    stored = StoredFilms(("film",), pictures, torch.tensor([0, frames]), points=torch.stack(places))
    return Shot(stored, 0, torch.arange(frames))


def test_perfect_features_follow_points_perfectly():
    shot = moving_film()
    truth = shot.points(slice(None))
    options = PropagateOptions(radius=None, k=1)
    followed = Propagate(options).follow(Identities(), shot, CPU, task())
    assert pck(followed, truth) == {"PCK@0.1": 100, "PCK@0.2": 100}
    copied = Copy(None).follow(None, shot, CPU, task())
    assert torch.equal(copied, truth[:1].expand_as(truth))
    assert pck(copied, truth)["PCK@0.1"] == 0


def test_films_without_points_are_errors():
    frames = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    bare = StoredFilms(("film",), frames, torch.tensor([0, 3]))
    with pytest.raises(UserError, match="'keypoints' needs films with points"):
        list(task().shots(ClipExamples(bare, torch.tensor([[0, 0, 1]]), VideoSpec(8, 3))))
    absent = torch.full((3, 2, 2), NAN)
    empty = StoredFilms(("film",), frames, torch.tensor([0, 3]), points=absent)
    with pytest.raises(UserError, match="film: its first frame has nothing to follow"):
        list(task().shots(ClipExamples(empty, torch.tensor([[0, 0, 1]]), VideoSpec(8, 3))))


def test_points_of_drawn_films_lie_on_their_objects():
    source = sources["moving-digits"]
    options = {"films": 20, "test_films": 5, "objects": 2}
    masks = source(source.Options(**options)).load("train").films.masks.long()
    found = source(source.Options(**options, labels="points")).load("train").films.points
    assert found.shape == (80, 10, 2)
    column, row = found.nan_to_num(0).round().long().unbind(dim=-1)
    below = masks[torch.arange(80)[:, None], row, column]
    real = ~found.isnan().any(dim=-1)
    first = real[:, :5]
    assert first.float().mean() > 0.8
    assert (below[:, :5] == 1)[first].float().mean() > 0.98
    assert (below[:, 5:] == 2)[real[:, 5:]].float().mean() > 0.98
    # A film of one object has no points of a second one.
    alone = ~(masks == 2).flatten(1).any(dim=1)
    assert found[alone][:, 5:].isnan().all()
