"""Images with numbers as labels: exact errors, protocols on pictures and CSV files, mistakes."""

import math

import pytest
import torch
from PIL import Image
from sklearn.linear_model import Ridge

from sslrun.data.examples import Batch, TensorExamples
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.recipe import load
from sslrun.stages.context import Context
from sslrun.stages.evaluate import cells
from sslrun.stages.reporting import Reporter
from sslrun.tasks.numbers import ImageNumbers
from sslrun.training.device import compute

SPEC = ImageSpec(4)
NAN = math.nan


def task(classes=(), **options):
    return ImageNumbers(ImageNumbers.Options(**options), SPEC, classes)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_errors_are_means_over_columns_of_known_numbers():
    numbers = task(unit="m")
    assert [(m.name, m.better, m.unit) for m in numbers.metrics] == [
        ("rmse", "lower", "m"), ("mae", "lower", "m"),
    ]  # fmt: skip
    truth = torch.tensor([[1.0, 5.0], [3.0, NAN], [5.0, 9.0]])
    outputs = torch.tensor([[1.0, 4.0], [3.0, 0.0], [8.0, 12.0]])
    expected = {"rmse": (3**0.5 + 5**0.5) / 2, "mae": (1 + 2) / 2}
    assert numbers.measure(outputs, truth) == pytest.approx(expected)
    numbers.fit_labels(truth)
    squares = [0, 0, 9 / (8 / 3), 1 / 4, 9 / 4]  # by the variances of both columns
    assert numbers.loss(outputs, truth).item() == pytest.approx(sum(squares) / 5)


def test_training_images_are_not_augmented_because_that_could_move_what_they_show():
    images = torch.randint(0, 256, (3, 3, 4, 4), dtype=torch.uint8)
    batch = Batch(images, draw(3, 2))
    inputs, targets = task().views(batch, torch.Generator())
    assert torch.equal(inputs, task().inputs(batch))
    assert torch.equal(targets, batch.labels)


def test_examples_with_numbers_count_as_one_class():
    examples = TensorExamples(torch.zeros(5, 3, 4, 4), draw(5, 2), (), SPEC)
    assert examples.strata.tolist() == [0] * 5


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    """Return `run(data, protocols, task)`, which evaluates the pixels' linear network."""
    root = tmp_path_factory.mktemp("numbers")

    def run(data, protocol, of_task="{name: numbers}", more=""):
        path = root / "recipe.yaml"
        path.write_text(
            "name: numbers\nbackbone: {name: mlp, width: 32, depth: 1}\n"
            f"data: {data}\npretext: null\nevaluate:\n"
            f"  one: {{data: {data}, task: {of_task}, protocols: [{protocol}]}}\n{more}"
        )
        context = Context(root / "runs", compute("cpu"), Reporter(quiet=True))
        (cell, *_) = cells(load(path), 0, root / "runs", [protocol])
        return cell, cell.execute(context), context

    return run


PICTURES = "{name: pictures, size: 12, pictures: 60}"


def features(cell, context):
    """Features and states of all splits."""
    from sslrun.stages.bench import CellBench

    bench = CellBench(cell, context)
    return {split: bench.features(split) for split in ("train", "val", "test")}


def test_knn_on_pictures_is_the_weighted_mean_of_neighbors(evaluate):
    cell, result, context = evaluate(PICTURES, "knn", more="knn: {k: 3, temperature: 0.1}\n")
    (bank, known), (queries, truth) = map(features(cell, context).get, ("train", "test"))
    assert truth.shape == (6, 2)
    errors = []
    for query, state in zip(queries, truth, strict=True):
        similarity = torch.cosine_similarity(bank, query[None])
        nearest = similarity.argsort(descending=True)[:3]
        weights = (similarity[nearest] / 0.1).exp()
        mean = (weights[:, None] * known[nearest]).sum(dim=0) / weights.sum()
        errors.append((mean - state).square())
    rmse = torch.stack(errors).mean(dim=0).sqrt().mean().item()
    assert result["metrics"]["test"]["rmse"] == pytest.approx(rmse, rel=1e-4)


def test_the_probe_on_pictures_is_ridge_regression(evaluate):
    cell, result, context = evaluate(PICTURES, "probe")
    split = features(cell, context)
    x, y = (part.double().numpy() for part in split["train"])
    mean, deviation = x.mean(axis=0), x.std(axis=0) + 1e-5
    reference = Ridge(alpha=result["l2"] * len(x)).fit((x - mean) / deviation, y)
    queries, truth = (part.double().numpy() for part in split["test"])
    errors = reference.predict((queries - mean) / deviation) - truth
    rmse = (errors**2).mean(axis=0) ** 0.5
    assert result["metrics"]["test"]["rmse"] == pytest.approx(rmse.mean(), rel=1e-3)


def test_fine_tuning_on_pictures_learns_the_position(evaluate):
    schedule = "finetune: {steps: 60, batch: 30, lr: 0.01, warmup: 0}\n"
    cell, result, context = evaluate(PICTURES, "finetune", more=schedule)
    (_, known), (_, truth) = map(features(cell, context).get, ("train", "test"))
    constant = (truth - known.mean(dim=0)).square().mean(dim=0).sqrt().mean().item()
    assert result["metrics"]["test"]["rmse"] < 0.7 * constant


def write_csv(folder, cells):
    """A CSV file of gray images, one for each row of cells, in columns x and y."""
    for number in range(len(cells)):
        Image.new("RGB", (8, 8), (8 * number,) * 3).save(folder / f"{number}.png")
    rows = [f"{number}.png,{','.join(row)}" for number, row in enumerate(cells)]
    path = folder / "list.csv"
    path.write_text("\n".join(["path,x,y", *rows]))
    return path


def test_columns_of_a_csv_file_are_numbers_to_learn(tmp_path, monkeypatch, evaluate):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    path = write_csv(tmp_path, [(f"{row / 2}", "" if row % 3 else "7") for row in range(24)])
    data = f"{{name: csv-images, path: {path}, numbers: [x, y]}}"
    cell, result, context = evaluate(data, "probe", of_task="null")
    assert result["metrics"]["test"]["rmse"] < 1
    _, labels = features(cell, context)["train"]
    assert labels.shape[1] == 2
    assert set(labels[:, 1][~labels[:, 1].isnan()].tolist()) == {7.0}


@pytest.mark.parametrize(
    ("numbers", "row", "message"),
    [
        ("[x]", ("north", "1"), r"list\.csv:2: its label is not a number: 'north'"),
        ("[x]", ("inf", "1"), r"list\.csv:2: its label is not a finite number: 'inf'"),
        ("[x, z]", ("1", "1"), r"list\.csv:1: no column 'z'"),
        ("[y]", ("1", ""), "label column 0 is empty: leave it out"),
        ("[x], label: y", ("1", "1"), "leave one out"),
    ],
)
def test_mistakes_in_a_csv_file_are_one_line(
    tmp_path, monkeypatch, evaluate, numbers, row, message
):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    path = write_csv(tmp_path, [row, *[("1", row[1])] * 11])
    with pytest.raises(UserError, match=message):
        evaluate(f"{{name: csv-images, path: {path}, numbers: {numbers}}}", "knn")


@pytest.mark.parametrize(
    ("data", "protocol", "of_task", "message"),
    [
        ("{name: digits}", "knn", "numbers", "labels that are numbers, but these are classes"),
        (PICTURES, "knn", "classification", "that are classes, but these are numbers: take task:"),
        (PICTURES, "finetune", "classification", "these are numbers: take task: numbers"),
        (PICTURES, "knn", "reach", r"or another task \(classification or numbers\)"),
        (PICTURES, "fewshot", "numbers", "the labels of 'numbers' are numbers here"),
    ],
)
def test_labels_of_another_kind_are_one_line(evaluate, data, protocol, of_task, message):
    with pytest.raises(UserError, match=message):
        evaluate(data, protocol, of_task)
