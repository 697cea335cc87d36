import numpy as np
import pytest
import torch

from sslrun.data.control.environments import make_environment
from sslrun.data.control.pictures import render, take_pictures
from sslrun.data.source import sources
from sslrun.data.specs import ImageSpec
from sslrun.data.splits import Splits
from sslrun.errors import UserError


def make(**options):
    source = sources["pictures"]
    return source(source.Options(**options))


def test_pictures_show_the_states_that_are_their_labels():
    examples = make(pictures=40).load("train")
    assert examples.spec == ImageSpec(48)
    assert examples.labels.shape == (40, 2)
    drawn = make_environment("point").draw(examples.labels.numpy())
    assert np.array_equal(examples.inputs.numpy(), drawn)


def test_splits_are_seeded_and_differ():
    source = make(pictures=200)
    train, val, test = [source.load(split) for split in source.splits]
    assert (len(train), len(val), len(test)) == (200, 20, 20)
    assert torch.equal(train.inputs, make(pictures=200).load("train").inputs)
    assert not torch.equal(train.labels, make(pictures=200, seed=1).load("train").labels)
    every = torch.cat([split.labels for split in (train, val, test)])
    assert len(every.unique(dim=0)) == 240


def test_the_first_pictures_of_a_larger_number_are_the_same():
    few, many = make(pictures=30).load("train"), make(pictures=400).load("train")
    assert torch.equal(few.inputs, many.inputs[:30])


def test_states_are_no_classes_to_balance():
    splits = Splits(make(pictures=40, validation=0.25), 0.25)
    assert (len(splits.train), len(splits.val)) == (30, 10)


def test_pictures_are_resized():
    examples = make(pictures=20, size=24).load("test")
    assert examples.inputs.shape == (2, 3, 24, 24)
    environment = make_environment("point")
    environment.reset_to(examples.labels.numpy())
    assert torch.equal(render(environment, 24), examples.inputs)


def test_pictures_of_an_episode_are_as_far_apart_as_asked():
    environment = make_environment("point")
    _, states = take_pictures(environment, 100, every=29, seed=0)
    first, later = states[:50], states[50:]
    assert (first - later).abs().max() > 0.3
    _, states = take_pictures(environment, 100, every=1, seed=0)
    assert (states[:50] - states[50:]).abs().max() <= 0.1 + 1e-6


def test_walls_are_never_entered():
    environment = make_environment("point:wall")
    _, states = take_pictures(environment, 300, 7, seed=0)
    assert environment.is_free(states.numpy()).all()


@pytest.mark.parametrize("title", ["paths", "key-to-door"])
def test_an_environment_without_pictures_is_one_line(title):
    source = make(environment=title)
    for attempt in (source.check_available, lambda: source.load("train")):
        with pytest.raises(UserError, match=f"{title}: this environment has no pictures"):
            attempt()
