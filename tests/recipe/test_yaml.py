"""YAML as people write it, and as an attacker would."""

import math
from contextlib import suppress

import pytest

from sslrun.errors import UserError
from sslrun.recipe import load
from sslrun.recipe.places import read_yaml

GOOD = """\
name: good
backbone: {name: mlp}
data: {name: digits}
pretext: {name: simclr}
pretrain: {steps: 2, batch: 16, lr: 0.1}
evaluate: {digits: {protocols: [knn], labels: [0.5, 1.0]}}
"""
BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 30)
)
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 9)}]}}\n" for level in range(1, 30)
)


def read(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return read_yaml(path)


def refusal(tmp_path, text, reader=load):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        reader(path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("010", 10), ("0o10", 8), ("0x10", 16), ("1:30", "1:30"), ("-.5", -0.5),
        ("2020-02-31", "2020-02-31"), ("yes", "yes"), ("True", True), ("~", None), ("", None),
        ("-.inf", -math.inf), ("'1'", "1"), ("!!str 1", "1"), ("+7", 7), ("1.", 1.0),
    ],
)  # fmt: skip
def test_scalars_mean_what_yaml_1_2_says(tmp_path, text, value):
    found = read(tmp_path, f"x: {text}").value["x"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x: !!int abc", ":1: not valid YAML: not a value of"),
        ("x: !!timestamp 2020-02-31", ":1: not valid YAML"),
        ("x: !!binary abc", ":1: not valid YAML"),
        ("x: 1\n? [a, {b: c}]\n: 1", ":2: a key should be a word"),
        ("x: 1\ny: &a [*a]", ":2: not valid YAML: too large, or nested too deeply"),
        ("x: 1\ny: " + "[" * 500 + "]" * 500, ":2: not valid YAML: more than 50 collections"),
        ('x: "a\0b"', ": not valid YAML"),
        (BOMB, "not valid YAML: too large"),
        ("x: '" + "y" * 2**21 + "'", ": not valid YAML: larger than 1,048,576 characters"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_refused_at_once(tmp_path, text, problem):
    assert problem in refusal(tmp_path, text, read_yaml)


def test_merges_of_merges_end(tmp_path):
    with suppress(UserError):  # versions of PyYAML differ in what they leave of it
        assert read(tmp_path, MERGES).value["a29"] == {"x": 1, "y": 2}


def test_aliases_and_merges_work_as_ever(tmp_path):
    source = read(tmp_path, "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a\n")
    assert source.value["b"] == {"x": 1, "y": 3}
    assert source.value["c"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("steps: 2", "steps: true", ":5: pretrain.steps: should be a number, not true or false"),
        ("0.5", "true", ":6: evaluate.digits.labels.0: should be a number, not true or false"),
        ("lr: 0.1", "lr: 1:30", ":5: pretrain.lr: "),
        ("1.0]", ".inf]", ":6: evaluate.digits.labels.1"),
        ("[knn]", "[]", ":6: evaluate.digits.protocols"),
        ("name: good", "name: " + "a" * 300, ":1: name: "),
        ("name: good", "name: ../../good", ":1: name: "),
        ("lr: 0.1", "seed: 10000", ":5: pretrain.seed: "),
        ("digits: {", '"digits\\e[31m": {data: digits, ', ":6: evaluate."),
        ("digits: {", '"=digits": {data: digits, ', ":6: evaluate."),
        ("lr: 0.1", "seed: 9223372036854775808", ":5: pretrain.seed: "),
    ],
)
def test_values_that_cannot_be_meant_are_refused(tmp_path, old, new, problem):
    assert problem in refusal(tmp_path, GOOD.replace(old, new))
