"""Every registered task returns exactly the metrics that it declares, and names their unit."""

import inspect
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sslrun.data.control.trajectories import Episodes, WindowExamples
from sslrun.data.examples import Examples, TensorExamples
from sslrun.data.graph.graphs import GraphRow, build_graphs
from sslrun.data.image.masks import MaskedImages
from sslrun.data.specs import ControlSpec, GraphSpec, ImageSpec, TextSpec, VideoSpec
from sslrun.data.text.passages import SpanRow, build_windows
from sslrun.data.text.sequences import Sequences, build_labeled, concatenate_texts, trim_ranges
from sslrun.data.text.tags import TagSet
from sslrun.data.text.tokenizer import SPECIALS, Tokenizer, blank_tokenizer, build_wordpiece
from sslrun.data.text.translation import target_ids
from sslrun.data.video.films import ClipExamples, StoredFilms
from sslrun.tasks.base import tasks

SPEC = TextSpec(blank_tokenizer(60), 16)
WORDS = ("red", "green", "blue", "what", "?")


class Case(NamedTuple):
    """A labeled split and the outputs of a head for it."""

    examples: Examples
    outputs: Tensor
    classes: tuple[str, ...] = ()
    complete: bool = True
    """Whether the data define all metrics, conditional ones included."""


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def images(classes: int, reassessed: bool) -> Case:
    labels = torch.arange(24) % classes
    names = tuple(map(str, range(classes)))
    if reassessed:
        labels = torch.stack([labels, (labels + 1) % classes, torch.full_like(labels, -1)], dim=1)
    pixels = torch.zeros(24, 3, 4, 4, dtype=torch.uint8)
    examples = TensorExamples(pixels, labels, names, ImageSpec(4))
    return Case(examples, draw(24, classes), names, reassessed)


def clips(classes: int) -> Case:
    of_images = images(classes, reassessed=True)
    frames = torch.zeros(48, 3, 4, 4, dtype=torch.uint8)
    stored = StoredFilms(("film",), frames, torch.tensor([0, 48]))
    places = torch.tensor([[0, 2 * number, 1] for number in range(24)])
    examples = ClipExamples(
        stored, places, VideoSpec(4, 2), of_images.examples.labels, of_images.classes
    )
    return of_images._replace(examples=examples)


def sentences(classes: int) -> Case:
    names = tuple(map(str, range(classes)))
    labels = torch.arange(12) % classes if classes else draw(12)
    examples = build_labeled([[7, 8, 9]] * 12, None, labels, names, SPEC)
    return Case(examples, draw(12, max(1, classes)), names)


def questions(unanswerable: bool) -> Case:
    entries = {word: place for place, word in enumerate([*SPECIALS, *WORDS])}
    spec = TextSpec(Tokenizer(build_wordpiece(True, entries)), 16)
    answers = (("green", 4),)
    rows = [
        SpanRow("a", "what ?", "red green blue", answers),
        SpanRow("b", "what ?", "red green blue", () if unanswerable else answers),
    ]
    windows = build_windows(rows, spec, 8, 4)
    return Case(windows, draw(len(windows), 16, 2), complete=unanswerable)


def tags(*names: str) -> Case:
    pieces = [[10, 11, 12], [20, 21]]
    tokens, offsets = concatenate_texts(pieces)
    none = torch.zeros(2, dtype=torch.int64)
    ranges = trim_ranges(torch.stack([offsets[:-1], offsets[1:], none, none], dim=1), 16)
    words = [[names[0], names[1], names[0]], [names[1], names[0]]]
    labels = torch.tensor([names.index(name) for sentence in words for name in sentence])
    examples = Sequences(tokens, ranges, None, names, SPEC, labels, TagSet(words))
    return Case(examples, draw(2, 5, len(names)), names)


def films() -> Case:
    truth = torch.zeros(4, 8, 8, dtype=torch.uint8)
    truth[:, :4, :4] = 1
    stored = StoredFilms(
        ("film",), torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 4]), truth
    )
    examples = ClipExamples(stored, torch.tensor([[0, 0, 1]]), VideoSpec(8, 4))
    return Case(examples, (draw(1, 4, 8, 8) > 0).byte())


def points() -> Case:
    places = draw(4, 3, 2).abs() + 1
    frames = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    stored = StoredFilms(("film",), frames, torch.tensor([0, 4]), points=places)
    examples = ClipExamples(stored, torch.tensor([[0, 0, 1]]), VideoSpec(8, 4))
    return Case(examples, draw(1, 4, 3, 2))


def masks() -> Case:
    labels = torch.zeros(2, 8, 8, dtype=torch.uint8)
    labels[:, :4, :4] = 1
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    return Case(MaskedImages(images, labels, (), ImageSpec(8)), (draw(2, 3, 4, 4) > 0).float())


def walks(targets: int) -> Case:
    episodes = Episodes(
        torch.zeros(1, 20), torch.zeros(1).long(), torch.zeros(1).double(), torch.tensor([0, 1])
    )
    examples = WindowExamples.of(episodes, ControlSpec("paths", states=20, actions=20))
    return Case(examples, draw(6, targets, 2), complete=targets > 1)


def graphs(classes: int) -> Case:
    names = tuple(map(str, range(classes)))
    labels = torch.arange(12) % classes if classes else draw(12)
    rows = [GraphRow([[0], [0]], [(0, 1)], [()])] * 12
    examples = build_graphs(rows, labels, names, GraphSpec((1,), (), 2))
    return Case(examples, draw(12, max(1, classes)), names)


def translations() -> Case:
    entries = {word: place for place, word in enumerate([*SPECIALS, *WORDS])}
    spec = TextSpec(Tokenizer(build_wordpiece(True, entries)), 16)
    texts = spec.tokenizer.encode(["red green", "blue"])
    examples = build_labeled(texts, None, target_ids(texts, spec.tokenizer, 16), (), spec)
    examples = replace(examples, extra=("red green", "blue"))
    return Case(examples, torch.full((2, 16), spec.tokenizer.sep))


def states() -> Case:
    images = torch.zeros(6, 3, 4, 4, dtype=torch.uint8)
    return Case(TensorExamples(images, draw(6, 2), (), ImageSpec(4)), draw(6, 2))


def minimal_pairs() -> Case:
    labels = torch.tensor([0, 0, 1, 1])
    texts = [[5, 6], [6, 5], [7, 8], [8, 7]]
    return Case(build_labeled(texts, None, labels, ("order", "verbs"), SPEC), draw(4))


CASES = [
    ("minimal-pairs", minimal_pairs()),
    ("reach", states()),
    ("numbers", states()),
    ("returns", walks(3)),
    ("returns", walks(1)),
    ("graphs", graphs(0)),
    ("graphs", graphs(2)),
    ("graphs", graphs(3)),
    ("translation", translations()),
    ("objects", masks()),
    ("masks", films()),
    ("keypoints", points()),
    ("clips", clips(10)),
    ("classification", images(10, reassessed=True)),
    ("classification", images(10, reassessed=False)),
    ("classification", images(3, reassessed=True)),
    ("classification", images(3, reassessed=False)),
    ("sentences", sentences(2)),
    ("sentences", sentences(3)),
    ("sentences", sentences(0)),
    ("span", questions(unanswerable=True)),
    ("span", questions(unanswerable=False)),
    ("tagging", tags("B-X", "O")),
    ("tagging", tags("NN", "VB")),
]


def built_in() -> set[str]:
    return {name for name in tasks if tasks[name].__module__.startswith("sslrun.")}


def test_every_registered_task_has_a_complete_case():
    assert {name for name, case in CASES if case.complete} == built_in()


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_task_returns_the_metrics_that_it_declares(name, case):
    task = tasks[name](tasks[name].Options(), case.examples.spec, case.classes)
    declared = [metric.name for metric in task.metrics]
    assert len(declared) == len(set(declared))
    expected = set(declared) if case.complete else set(declared) - task.conditional
    assert set(task.score(case.outputs, case.examples)) == expected
    assert task.primary.name not in task.conditional
    assert task.conditional <= {metric.name for metric in task.metrics}


@pytest.mark.parametrize("name", sorted(built_in()))
def test_the_description_of_a_task_names_the_unit_of_its_metrics(name):
    text = " ".join(inspect.getdoc(tasks[name]).split())
    cases = [case for task, case in CASES if task == name]
    metrics = [
        metric
        for case in cases
        for metric in tasks[name](tasks[name].Options(), case.examples.spec, case.classes).metrics
    ]
    if all(metric.unit == "%" for metric in metrics):
        assert "metrics are in percent" in text
    else:
        assert "in the units of the labels" in text or "is in percent" in text
