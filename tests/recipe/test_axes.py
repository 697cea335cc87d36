"""Axes of sweeps: their exact rows, and mistakes with file, line and key."""

import pytest

from sslrun.errors import UserError
from sslrun.recipe import load, load_sweep
from sslrun.recipe.axes import Random, Range, name_point

BASE = """\
name: varied
base:
  backbone: {name: resnet18, stem: small, channels: 4}
  data: {name: digits, size: 8}
  pretext: {name: simclr, temperature: 0.5}
  pretrain: {epochs: 4, batch: 64, lr: 0.01}
  evaluate: {digits: {protocols: [knn, probe], labels: [0.1, 1.0]}}
"""


@pytest.fixture
def read(tmp_path):
    def read(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(BASE + text)
        return load_sweep(path)

    return read


def test_a_grid_has_every_combination_for_every_row(read):
    sweep = read(
        "rows: {SimCLR: {}, ViT: {backbone: vit-tiny}}\n"
        "grid: {pretrain.lr: [0.1, 0.2], pretext.temperature: [0.5, 1.0]}\n"
    )
    assert list(sweep.rows) == [
        f"{row}, lr={lr}, temperature={temperature}"
        for row in ("SimCLR", "ViT")
        for lr in (0.1, 0.2)
        for temperature in (0.5, 1.0)
    ]
    row = sweep.rows["ViT, lr=0.2, temperature=0.5"]
    found = row.backbone.name, row.pretrain.lr, row.pretext.options.temperature
    assert found == ("vit-tiny", 0.2, 0.5)


def test_zip_pairs_values_and_combines_with_the_others(read):
    sweep = read("zip: {pretrain.epochs: [1, 2], pretrain.batch: [32, 64]}\ngrid: {knn.k: [5]}\n")
    settings = {name: (r.pretrain.epochs, r.pretrain.batch) for name, r in sweep.rows.items()}
    assert settings == {"k=5, epochs=1, batch=32": (1, 32), "k=5, epochs=2, batch=64": (2, 64)}
    assert list(read("").rows) == ["varied"]  # a base alone is a row


def test_random_draws_are_the_same_each_time_and_independent_of_each_other(read):
    text = "random: {draws: 3, space: {pretrain.lr: {log: [0.001, 0.1]}, pretrain.batch: [32, 64]}}"
    rows = read(text).rows
    assert list(rows) == ["lr=0.002986, batch=32", "lr=0.008491, batch=32", "lr=0.007547, batch=64"]
    space = {"a": Range(uniform=(0, 1)), "b": (1, 2, 3)}
    few, many = (Random(draws=draws, space=space).points() for draws in (5, 50))
    assert many[:5] == few
    with_key = Random(draws=5, space={**space, "c": (1, 2)}).points()
    assert [{key: point[key] for key in space} for point in with_key] == few
    assert len(Random(draws=50, space={"b": (1, 2, 3)}).points()) == 3  # there are no more
    numbers = [Range(uniform=(1, 3), integer=True).draw(share / 30) for share in range(30)]
    assert {9 <= numbers.count(number) <= 11 for number in (1, 2, 3)} == {True}
    assert all(0.001 <= Range(log=(0.001, 0.1)).draw(s / 9) <= 0.1 for s in range(9))


def test_points_are_named_by_the_last_part_of_their_keys():
    assert name_point({"a.lr": 1e-05, "pretext": {"name": "byol"}}) == "lr=1e-05, pretext=byol"
    assert name_point({"a.lr": 1, "b.lr": None}) == "a.lr=1, b.lr=null"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {pretrain.lr: 3}", r"mine.yaml:8: grid.pretrain.lr: should be"),
        ("grid: {pretrain.lrr: [1]}", r"mine.yaml:8: pretrain.lrr: no such option.*Did you mean"),
        ("zip: {knn.k: [1], knn.temperature: [1, 2]}", "mine.yaml:8: zip: .*knn.k: 1, knn.temp"),
        (
            "grid: {knn.k: [1]}\nzip: {knn.k: [2]}",
            "mine.yaml:9: zip.knn.k: another axis varies this key already",
        ),
        ("random: {draws: 0, space: {knn.k: [1]}}", "mine.yaml:8: random.draws: "),
        ("random: {draws: 2, space: {knn.k: {log: [0, 1]}}}", "random.space.knn.k.*above 0"),
        ("random: {draws: 2, space: {knn.k: {uniform: [2, 1]}}}", "increase, not .2, 1."),
        ("random: {draws: 2, space: {knn.k: {}}}", "give either uniform: .low, high. or log"),
        ("random: {draws: 2, space: {knn.k: {log: [0.5, 2], integer: true}}}", "whole numbers"),
        ("grid: {pretext: [{name: simclr}, {name: simclr}]}", "two rows would be named"),
        ("search: {trials: 2, space: {knn.k: [1]}}", "mine.yaml:8: search: .objective. is missing"),
    ],
)
def test_mistakes_are_one_line_with_their_place(read, text, message):
    with pytest.raises(UserError, match=message) as error:
        read(text)
    assert "\n" not in str(error.value)


SEARCH = "search:\n  trials: 2\n  objective: {%s}\n  space: {%s}\n  prune: null\n"


@pytest.mark.parametrize(
    ("objective", "space", "more", "message"),
    [
        (
            "task: digit, protocol: knn",
            "knn.k: [1]",
            "",
            "mine.yaml:10: search.objective.task: row",
        ),
        ("task: digits, protocol: lpft", "knn.k: [1]", "", "search.objective.protocol: row"),
        ("task: digits, protocol: probe, labels: 0.5", "knn.k: [1]", "", "has 0.1, 1: choose"),
        ("task: digits, protocol: knn", "knn.kk: [1]", "", "mine.yaml:11: knn.kk: no such option"),
        ("task: digits, protocol: knn", "pretrain.lr: {uniform: [-1, 1]}", "", "mine.yaml:11: pre"),
        (
            "task: digits, protocol: knn",
            "knn.k: [1]",
            "rows: {one: {data.validation: 0, evaluate.digits.protocols: [knn]}}\n",
            "mine.yaml:11: search.objective: a search compares trials on validation, but",
        ),
    ],
)
def test_the_mistakes_of_a_search_are_found_when_it_is_read(read, objective, space, more, message):
    with pytest.raises(UserError, match=message):
        read(more + SEARCH % (objective, space))


def test_a_search_without_pretraining_cannot_prune(read):
    text = SEARCH % ("task: digits, protocol: knn", "knn.k: [1]")
    with pytest.raises(UserError, match=r"search\.prune: row 'none' pretrains nothing"):
        read("rows: {none: {pretext: null}}\n" + text.replace("prune: null", "prune: knn"))


def test_axes_make_a_file_a_sweep(read, tmp_path):
    read("grid: {knn.k: [5]}")
    with pytest.raises(UserError, match="is a sweep: run it with `sslrun sweep"):
        load(tmp_path / "mine.yaml")
