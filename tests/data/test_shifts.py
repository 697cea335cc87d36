"""Shifted test sets: matching of classes, dropped examples, and error messages."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sslrun.data.examples import TensorExamples
from sslrun.data.image.corruptions import CorruptedExamples
from sslrun.data.shifts import Shift, make_parts
from sslrun.data.source import sources
from sslrun.data.specs import ImageSpec
from sslrun.data.splits import load_splits
from sslrun.errors import UserError


def splits(classes, labels):
    """A set with a test split only; each image is its own number."""
    inputs = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    test = TensorExamples(inputs, torch.tensor(labels), tuple(classes), ImageSpec(4))
    return SimpleNamespace(test=test, classes=tuple(classes), spec=ImageSpec(4))


OWN = splits(["airplane", "automobile", "bird", "frog"], [0, 1, 2, 3])


def test_classes_match_by_name_or_mapping_and_others_are_dropped():
    other = splits(["Bird", "car", "monkey", "air plane", "whale"], [0, 0, 1, 2, 2, 3, 0])
    part = make_parts("stl", Shift(data="x", classes={"car": "automobile"}), OWN, other)[""]
    assert part.examples.labels.tolist() == [2, 2, 1, 0, 2]  # class numbers of the task
    assert part.examples.classes == OWN.classes
    assert part.examples.inputs[:, 0, 0, 0].tolist() == [0, 1, 2, 5, 6]
    assert part.dropped == {"monkey": 2}  # whales have no examples and are not reported
    without = make_parts("stl", Shift(data="x"), OWN, other)[""]
    assert without.dropped == {"car": 1, "monkey": 2}


def test_several_classes_of_a_shift_may_map_to_one_class():
    other = splits(["jet", "glider", "bird"], [0, 1, 2])
    part = make_parts(
        "kinds", Shift(data="x", classes={"jet": "airplane", "glider": "airplane"}), OWN, other
    )[""]
    assert part.examples.labels.tolist() == [0, 0, 2]


def test_if_a_shift_merges_classes_any_of_them_is_correct():
    """As in HANS: what is not entailed is neutral or contradicted."""
    own = splits(["entailment", "neutral", "contradiction"], [0, 1, 2])
    other = splits(["entailment", "non-entailment"], [0, 1, 1])
    shift = Shift(data="hans", classes={"non-entailment": ("neutral", "contradiction")})
    part = make_parts("hans", shift, own, other)[""]
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0], [1.5, 1.0, 1.4]])
    merged = part.merge_classes(scores)
    assert merged.argmax(dim=1).tolist() == [0, 1, 0]
    assert part.examples.labels.tolist() == [0, 1, 1]
    assert scores[1].tolist() == [0.0, 1.0, 2.0]  # the argument is unchanged


@pytest.mark.parametrize(
    ("classes", "shift_classes", "words"),
    [
        (
            {},
            ["cat", "dog"],
            r"shift 's': none of its classes \(cat, dog\) has the name of a class of the task "
            r"\(airplane, ",
        ),
        (
            {"caat": "bird"},
            ["cat", "bird"],
            r"shift 's': that set has no class 'caat'\. Did you mean 'cat'",
        ),
        (
            {"cat": "brid"},
            ["cat", "bird"],
            r"shift 's': the task has no class 'brid'\. Did you mean 'bird'",
        ),
        (
            {"a": ("bird", "frog"), "b": "frog"},
            ["a", "b"],
            r"shift 's': class 'frog' is matched to 'a' and to 'b'",
        ),
    ],
)
def test_errors_in_the_classes_are_one_line(classes, shift_classes, words):
    with pytest.raises(UserError, match=words) as error:
        make_parts("s", Shift(data="x", classes=classes), OWN, splits(shift_classes, [0, 1]))
    assert "\n" not in str(error.value)


def test_a_set_without_labels_is_rejected():
    other = splits(["bird", "frog"], [0, 1])
    other.test = TensorExamples(other.test.inputs, None, (), ImageSpec(4))
    with pytest.raises(UserError, match="shift 's': the set has no labels"):
        make_parts("s", Shift(data="x"), OWN, other)


def test_corruptions_and_severities_are_parts_of_one_shift():
    shift = Shift(corruption=("fog", "contrast"), severity=(1, 5))
    parts = make_parts("weather", shift, OWN, None)
    assert list(parts) == ["fog 1", "fog 5", "contrast 1", "contrast 5"]
    assert parts["fog 5"].examples == CorruptedExamples(OWN.test, "fog", 5)


def test_a_folder_of_a_domain_is_a_shift_of_another_domains_folder(tmp_path, monkeypatch):
    """Domains as folders of class folders, as in DomainNet; not every domain has every class."""
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SSLRUN_WORKERS", "1")
    for domain, classes in (("sketch", "cat dog owl"), ("real", "ape cat owl")):
        for name in classes.split():
            for number in range(8):
                file = tmp_path / domain / name / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(file)
    own, other = (
        load_splits("folder", sources["folder"].Options(path=tmp_path / domain))
        for domain in ("sketch", "real")
    )
    part = make_parts("real", Shift(data="folder"), own, other)[""]
    assert part.dropped == {"ape": 2}  # a quarter of the domain is its test split
    assert part.examples.labels.bincount(minlength=3).tolist() == [2, 0, 2]
    assert part.examples.classes == ("cat", "dog", "owl")
