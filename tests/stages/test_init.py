"""Starter recipes of `sslrun init`: they fit the data, pass the checks, and run."""

import csv
import json
import sys

import pytest
from PIL import Image

from sslrun import cli
from sslrun.data.source import sources
from sslrun.errors import UserError
from sslrun.recipe import load
from sslrun.stages.init import inspect_data, write_starter

WORDS = ("good film with a fine cast", "bad film with a dull plot")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def photos(folder, count=24, side=40, classes=("cats", "dogs")):
    for number in range(count):
        path = folder / "photos" / classes[number % len(classes)] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side + number % 3), (number * 9, 255 - number * 9, 100)).save(path)
    return folder / "photos"


def reviews(folder, suffix, count=60, columns=("review", "label")):
    rows = [
        {columns[0]: f"{WORDS[number % 2]} number {number}", columns[1]: ("pos", "neg")[number % 2]}
        for number in range(count)
    ]
    path = folder / f"reviews{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".parquet":
        import pandas

        pandas.DataFrame(rows).to_parquet(path)
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def run(monkeypatch, capsys, *arguments, code=0):
    monkeypatch.setattr(sys, "argv", ["sslrun", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    captured = capsys.readouterr()
    assert exit.value.code == code, captured.err
    return captured


QUICK = [
    "--set",
    "pretrain={epochs: null, steps: 2, batch: 8}",
    "--set",
    "finetune={steps: 2, batch: 8}",
]


def test_a_folder_of_images_becomes_a_recipe_that_runs(folder, monkeypatch, capsys):
    photos(folder)
    out = run(monkeypatch, capsys, "init", "mine", "--from", "photos").out
    assert "sslrun check mine.yaml" in out
    assert "sslrun sweep mine.yaml" in out
    recipe = load(folder / "mine.yaml")
    assert recipe.data.as_dict()["size"] == 32
    assert recipe.pretrain.batch <= 16 * 0.65
    assert "backbone" in run(monkeypatch, capsys, "check", "mine.yaml", "backbone.channels=4").out
    table = run(
        monkeypatch, capsys, "sweep", "mine.yaml", *QUICK, "--set", "backbone.channels=4"
    ).out
    assert all(protocol in table for protocol in ("knn", "probe", "finetune", "scratch"))


def test_a_table_of_texts_becomes_a_recipe_that_runs(folder, monkeypatch, capsys):
    monkeypatch.setenv("SSLRUN_CACHE", str(folder / "cache"))
    reviews(folder, ".csv")
    run(monkeypatch, capsys, "init", "--from", "reviews.csv")
    recipe = load(folder / "my-experiment.yaml")
    assert recipe.data.name == "text"
    assert recipe.evaluate["mine"].data.name == "sentences"
    assert recipe.evaluate["mine"].data.options.first == "review"
    assert (
        "bert-tiny"
        in run(
            monkeypatch,
            capsys,
            "check",
            "my-experiment.yaml",
            "backbone.width=16",
            "backbone.heads=2",
        ).out
    )
    small = [
        "--set",
        "backbone={name: bert-tiny, depth: 1, width: 16, heads: 2}",
        "--set",
        "evaluate.mine.labels=[1.0]",
    ]
    assert "probe" in run(monkeypatch, capsys, "sweep", "my-experiment.yaml", *QUICK, *small).out


@pytest.mark.parametrize("text", [False, True])
def test_starter_recipes_without_user_data_download_nothing(folder, text):
    recipe = load(write_starter("starter", text, None))
    assert recipe.data.name == ("world" if text else "digits")
    assert len(recipe.evaluate["mine"].protocols) == 4


def test_digits_are_never_mirrored_and_images_of_ones_own_are(folder):
    photos(folder)
    for path, flip in ((None, 0.0), (folder / "photos", 0.5)):
        recipe = load(write_starter("digits" if path is None else "mine", False, path))
        assert recipe.pretext.options.augmentation.flip == flip
        assert recipe.evaluate["mine"].task.options.augmentation.flip == flip


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_tables_of_every_format_and_with_any_column_names_are_read(folder, suffix):
    layout = inspect_data(reviews(folder, suffix, columns=("what they wrote", "verdict")))
    assert (layout.count, layout.classes) == (60, 2)
    assert 'column: "what they wrote"' in layout.data
    assert "label: verdict" in layout.task_data
    assert load(write_starter("mine", False, folder / f"reviews{suffix}")).evaluate


def test_data_without_labels_get_a_recipe_without_evaluations(folder):
    photos(folder, classes=(".",))
    (folder / "texts").mkdir()
    (folder / "texts" / "book.txt").write_text("A line.\nAnother line.\n" * 50)
    images, text = (
        load(write_starter("images", False, folder / "photos")),
        load(write_starter("text", False, folder / "texts")),
    )
    assert not images.evaluate
    assert not text.evaluate
    assert text.data.name == "text"


def test_a_table_that_lists_images_becomes_a_recipe(folder):
    photos(folder)
    rows = [
        {"path": f"photos/{kind}/{number}.png", "label": kind}
        for number in range(24)
        for kind in [("cats", "dogs")[number % 2]]
    ]
    with open(folder / "list.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ("path", "label"))
        writer.writeheader()
        writer.writerows(rows)
    if "csv-images" not in sources:
        with pytest.raises(UserError, match="lists images"):
            inspect_data(folder / "list.csv")
        return
    recipe = load(write_starter("mine", False, folder / "list.csv"))
    assert recipe.data.name == "csv-images"
    assert inspect_data(folder / "list.csv").classes == 2


def test_unwritable_and_unreadable_files_are_errors(folder):
    write_starter("mine", False, None)
    with pytest.raises(UserError, match=r"mine\.yaml: is there already"):
        write_starter("mine", False, None)
    with pytest.raises(UserError, match="a recipe's name has letters"):
        write_starter("my recipe", False, None)
    with pytest.raises(UserError, match="no such file or folder"):
        write_starter("other", False, folder / "nowhere")
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="found neither images nor text"):
        inspect_data(folder / "empty")
    assert not (folder / "other.yaml").exists()
