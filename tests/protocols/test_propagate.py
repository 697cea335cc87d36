"""Label propagation: exact cases, the neighborhood, memory, and mistakes."""

import pytest
import torch
import torch.nn.functional as F

from sslrun.data.specs import VideoSpec
from sslrun.data.video.films import ClipExamples, Shot, StoredFilms
from sslrun.errors import UserError
from sslrun.protocols import propagate as module
from sslrun.protocols.propagate import Copy, Labeled, Propagate, PropagateOptions, propagate
from sslrun.tasks.following import FollowingOptions
from sslrun.tasks.masks import Masks

CPU = torch.device("cpu")


class Identities(torch.nn.Module):
    """A backbone whose features are the one-hot value of each pixel: perfect features."""

    def dense(self, inputs, layer=None):
        values = (inputs[:, 0] * 255).round().long()
        return F.one_hot(values, 8).permute(0, 3, 1, 2).float()


def films(masks, names=("film",)):
    """Films whose pixels are the numbers of the objects."""
    masks = torch.as_tensor(masks, dtype=torch.uint8)
    frames = masks[:, None].expand(-1, 3, -1, -1).contiguous()
    return StoredFilms(names, frames, torch.tensor([0, len(masks)]), masks)


def moving_objects():
    """Two objects that move apart over six frames."""
    masks = torch.zeros(6, 12, 12, dtype=torch.uint8)
    for time in range(6):
        masks[time, 2:5, time : time + 3] = 1
        masks[time, 7:10, 9 - time : 12 - time] = 2
    return masks


def shot(masks):
    stored = films(masks)
    return Shot(stored, 0, torch.arange(len(masks)))


def task(frames=6):
    return Masks(FollowingOptions(), VideoSpec(12, frames), ())


def score(predicted, masks):
    return task().summarize(task().measure_shot(predicted, masks))


@pytest.mark.parametrize("options", [{}, {"radius": None}, {"stretch": True}, {"window": "square"}])
def test_perfect_features_follow_objects_perfectly(options):
    masks = moving_objects()
    predicted = Propagate(PropagateOptions(radius=3, k=3).model_copy(update=options)).follow(
        Identities(), shot(masks), CPU, task()
    )
    assert torch.equal(predicted, masks)
    assert score(predicted, masks)["J&F"] == 100
    assert score(Copy(None).follow(None, shot(masks), CPU, task()), masks)["J"] < 60


def test_still_films_and_a_radius_of_zero_copy_the_first_mask():
    still = moving_objects()[:1].expand(5, -1, -1)
    options = PropagateOptions(context=2, radius=0, k=1, first="within")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 8, (6, 3, 12, 12), generator=generator, dtype=torch.uint8)
    moving = StoredFilms(("film",), noise, torch.tensor([0, 6]), moving_objects())
    copied = Propagate(options).follow(Identities(), Shot(moving, 0, torch.arange(6)), CPU, task())
    assert torch.equal(copied, moving_objects()[:1].expand(6, -1, -1))
    assert torch.equal(
        Propagate(PropagateOptions()).follow(Identities(), shot(still), CPU, task()), still
    )


def naive(features, context, options):
    """Propagate cell by cell."""
    _, height, width = features.shape
    labels = torch.zeros(context[0].labels.shape[0], height, width)
    for row in range(height):
        for column in range(width):
            found = []
            for number, frame in enumerate(context):
                for y in range(height):
                    for x in range(width):
                        free = number == 0 and options.first == "free"
                        distance = (y - row) ** 2 + (x - column) ** 2
                        if free or distance < options.radius**2:
                            similar = float(features[:, row, column] @ frame.features[:, y, x])
                            found.append((similar, frame.labels[:, y, x]))
            found.sort(key=lambda pair: -pair[0])
            best = found[: options.k]
            weights = torch.tensor([similar for similar, _ in best]) / options.temperature
            for weight, (_, label) in zip(weights.softmax(0), best, strict=True):
                labels[:, row, column] += weight * label
    return labels


@pytest.mark.parametrize("first", ["free", "within"])
@pytest.mark.parametrize("limit", [1, 2**24])
def test_propagation_equals_a_loop_over_cells_in_parts_of_any_size(first, limit, monkeypatch):
    monkeypatch.setattr(module, "AFFINITIES", limit)
    generator = torch.Generator().manual_seed(0)
    features = [F.normalize(torch.randn(5, 4, 6, generator=generator), dim=0) for _ in range(4)]
    context = [Labeled(f, torch.rand(3, 4, 6, generator=generator)) for f in features[:3]]
    options = PropagateOptions(radius=2, k=4, first=first, temperature=0.1)
    torch.testing.assert_close(
        propagate(features[3], context, options), naive(features[3], context, options)
    )


def test_the_number_of_frames_encoded_at_a_time_does_not_matter(monkeypatch):
    masks = moving_objects()
    whole = Propagate(PropagateOptions()).follow(Identities(), shot(masks), CPU, task())
    monkeypatch.setattr(module, "FRAMES", 1)
    assert torch.equal(
        Propagate(PropagateOptions()).follow(Identities(), shot(masks), CPU, task()), whole
    )


def test_void_pixels_do_not_count_and_new_objects_are_errors():
    masks = moving_objects()
    void = masks.clone()
    void[2, 2:5] = 255
    wrong = masks.clone()
    wrong[2, 2:5] = 0
    assert score(wrong, void)["J"] == 100
    later = masks.clone()
    later[3, 0, 0] = 5
    with pytest.raises(UserError, match="object 5 is not in the first frame"):
        score(masks, later)


def test_films_that_cannot_be_scored_are_errors():
    short = ClipExamples(films(moving_objects()[:2]), torch.tensor([[0, 0, 1]]), VideoSpec(12, 2))
    with pytest.raises(UserError, match="film: has 2 frames"):
        list(task(2).shots(short))
    bare = StoredFilms(("film",), torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 4]))
    with pytest.raises(UserError, match="needs films with masks"):
        list(task().shots(ClipExamples(bare, torch.tensor([[0, 0, 1]]), VideoSpec(8, 4))))
