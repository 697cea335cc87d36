"""Pictures that need a network or the data: neighbors, a map of features, attention, mistakes."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslrun.backbones import load_backbone
from sslrun.backbones.base import Backbone
from sslrun.backbones.image import patch_attention
from sslrun.data.examples import Examples
from sslrun.data.image.augment import to_float
from sslrun.data.specs import ImageSpec, TextSpec
from sslrun.data.splits import Splits, load_splits
from sslrun.protocols.attend import heaviest
from sslrun.protocols.features import extract
from sslrun.recipe import Recipe, load
from sslrun.report.charts import heat_map, scatter_map
from sslrun.results.record import Predictions, RunRecord
from sslrun.stages.attend import ImagePicture
from sslrun.stages.pictures import draw_matrices, draw_sheet, to_picture
from sslrun.tasks.base import Task, tasks

BANK, MAPPED = 2000, 300
"""Largest number of training examples to search for neighbors, and of points of a map."""
TSNE_STEPS = 500
"""Half of scikit-learn's default, which is for more points."""
QUERIES, NEIGHBORS = 6, 6
TEXT_QUERIES, TEXT_NEIGHBORS = 4, 3
MISTAKES, ATTENDED = 8, 4
WORDS, LETTERS = 24, 160
"""Largest number of tokens whose attention is drawn, and of letters of a text."""
BATCH = 256
SMALL = 100_000
"""Size in bytes up to which a picture is embedded as it is."""
KINDS = {".svg": "svg+xml", ".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".gif": "gif"}
"""Ending of a picture's file -> its type."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Look:
    """A picture or a text of a run, with a title and a caption."""

    title: str
    caption: str
    html: str
    """An SVG or an img element, or escaped text; safe to put on the page."""


class Subject:
    """A finished pretraining: its backbone, its data, and how the data's task reads them.

    Raises UserError if the weights or the data cannot be read.
    """

    def __init__(self, record: RunRecord) -> None:
        self.recipe: Recipe = load(record.folder / "recipe.yaml")
        self.backbone: Backbone = load_backbone(record.folder).eval()
        self.splits: Splits = load_splits(self.recipe.data.name, self.recipe.data.options)
        named = self.splits.source.default_task(self.splits.source.options)
        self.task: Task = tasks[named](
            tasks[named].Options(), self.splits.spec, self.splits.classes
        )

    def features(self, examples: Examples) -> Tensor:
        """Compute the features (N, D) of examples, each of length 1."""
        vectors = extract(self.backbone, examples, self.task.inputs, CPU, BATCH, self.task.vector)
        return torch.nn.functional.normalize(vectors, dim=1)


def looks_of(record: RunRecord) -> Iterator[Look]:
    """Draw the features of a finished pretraining on examples that were not trained on.

    Raises UserError if the weights or the data cannot be read.
    """
    subject = Subject(record)
    test = sample(subject.splits.test, MAPPED)
    features = subject.features(test)
    attends = "attention" in subject.backbone.offers
    if isinstance(subject.splits.spec, ImageSpec):
        yield neighbors(subject, test, features)
        if attends:
            yield attention(subject, test)
    elif isinstance(subject.splits.spec, TextSpec):
        yield similar_texts(subject, test, features)
        if attends:
            yield attention_of_text(subject, test)
    if test.labels is not None and not test.labels.is_floating_point() and test.labels.ndim == 1:
        yield feature_map(features, test)


def sample(examples: Examples, count: int) -> Examples:
    """Draw at most `count` examples, always the same."""
    if len(examples) <= count:
        return examples
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))
    return examples.subset(order[:count].sort().values)


def neighbors(subject: Subject, test: Examples, features: Tensor) -> Look:
    """Draw the training images whose features are most similar to those of test images."""
    bank = sample(subject.splits.train, BANK)
    similar = (features[:QUERIES] @ subject.features(bank).T).topk(min(NEIGHBORS, len(bank)))
    columns = {"test image": images_of(test, torch.arange(len(similar.indices)))}
    for rank in range(similar.indices.shape[1]):
        columns[f"neighbor {rank + 1}"] = images_of(bank, similar.indices[:, rank])
    caption = (
        f"Test images, and the nearest of {len(bank):,} training images by cosine similarity of "
        "features."
    )
    return Look("Nearest neighbors", caption, image_of(columns))


def attention(subject: Subject, test: Examples) -> Look:
    """Draw the attention of [CLS] in the last layer on a few test images."""
    images = images_of(test, torch.arange(min(ATTENDED, len(test))))
    with torch.inference_mode():
        maps = patch_attention(subject.backbone, images)
    columns: dict[str, list[Tensor]] = {}
    for image, weights in zip(images, maps, strict=True):
        picture = ImagePicture(image, weights, heaviest(weights, 0.6))
        for title, drawn in picture.summary.items():
            columns.setdefault(title, []).append(drawn)
    stacked = {title: torch.stack(drawn) for title, drawn in columns.items()}
    return Look("Attention", "What [CLS] attends to in the last layer.", image_of(stacked))


def similar_texts(subject: Subject, test: Examples, features: Tensor) -> Look:
    """List the training texts whose features are most similar to those of test texts."""
    bank = sample(subject.splits.train, BANK)
    similar = features[:TEXT_QUERIES] @ subject.features(bank).T
    similar = similar.topk(min(TEXT_NEIGHBORS, len(bank))).indices
    lines = []
    for text, nearest in zip(texts_of(test, torch.arange(len(similar))), similar, strict=True):
        found = "".join(f"<li>{html.escape(other)}</li>" for other in texts_of(bank, nearest))
        lines.append(f"<li>{html.escape(text)}<ul>{found}</ul></li>")
    caption = f"Test texts, and the nearest of {len(bank):,} training texts by cosine similarity."
    return Look("Nearest texts", caption, f"<ul>{''.join(lines)}</ul>")


def attention_of_text(subject: Subject, test: Examples) -> Look:
    """Draw the attention between the tokens of a test text in the last layer."""
    assert isinstance(subject.backbone.spec, TextSpec)
    strings = subject.backbone.spec.tokenizer.strings
    (batch,) = test.batches([torch.arange(1)], CPU)
    inputs = subject.task.inputs(batch)
    count = min(int((inputs.documents[0] > 0).sum()), WORDS)
    with torch.inference_mode():
        weights = subject.backbone.attention(inputs)[0, :, :count, :count].float()
    labels = [strings[token] for token in inputs.ids[0, :count].tolist()]
    matrices = {f"head {head}": matrix for head, matrix in enumerate(weights, start=1)}
    caption = "Attention in the last layer, from the token of a row to that of a column."
    return Look("Attention", caption, _compressed(draw_matrices(matrices, labels, 2)))


def texts_of(examples: Examples, indices: Tensor) -> list[str]:
    """Decode texts, without special tokens and padding, at most `LETTERS` of each."""
    assert isinstance(examples.spec, TextSpec)
    (batch,) = examples.batches([indices], CPU)
    ends, texts = (examples.spec.tokenizer.cls, examples.spec.tokenizer.sep), []
    for ids, documents in zip(batch.inputs.ids, batch.inputs.documents, strict=True):
        words = [token for token in ids[documents > 0].tolist() if token not in ends]
        text = examples.spec.tokenizer.decode(words)
        texts.append(text if len(text) <= LETTERS else f"{text[:LETTERS]} …")
    return texts


def feature_map(features: Tensor, test: Examples) -> Look:
    """Draw features in two dimensions by t-SNE (van der Maaten and Hinton, JMLR 2008)."""
    from sklearn.manifold import TSNE

    assert test.labels is not None
    perplexity = min(30.0, max(1.0, (len(features) - 1) / 3))
    layout = TSNE(perplexity=perplexity, init="pca", random_state=0, max_iter=TSNE_STEPS)
    points = layout.fit_transform(features.numpy())
    drawn = scatter_map(points, test.labels.tolist(), test.classes)
    caption = (
        f"t-SNE of the features of {len(features):,} test examples in the colors of their classes. "
        "Distances between groups and their sizes mean little."
    )
    return Look("Map of features", caption, drawn)


# ---------------------------------------------------------------- evaluations


def confusion(predictions: Predictions) -> Look:
    """Draw the share of each true class that was predicted as each class."""
    count = len(predictions.classes)
    table = np.zeros((count, count))
    np.add.at(table, (predictions.truth, predictions.predicted), 1)
    shares = table / table.sum(axis=1, keepdims=True).clip(min=1)
    caption = f"Percent of each true class, of {len(predictions.truth):,} test examples."
    drawn = heat_map(shares.tolist(), predictions.classes, "predicted", "true")
    return Look("Confusion", caption, drawn)


def mistakes(record: RunRecord, predictions: Predictions) -> Look | None:
    """Draw the wrong predictions of the largest margin; None if there is no image to draw.

    Raises UserError if the data cannot be read.
    """
    wrong = np.flatnonzero(~predictions.correct)
    chosen = wrong[predictions.margin[wrong].argsort()[::-1][:MISTAKES]]
    data = load(record.folder / "recipe.yaml").evaluate[record.task].data
    test = load_splits(data.name, data.options).test
    if not len(chosen) or not isinstance(test.spec, ImageSpec) or len(test) <= chosen.max():
        return None
    items = []
    for index, image in zip(chosen.tolist(), images_of(test, torch.tensor(chosen)), strict=True):
        truth = predictions.classes[predictions.truth[index]]
        predicted = predictions.classes[predictions.predicted[index]]
        title = html.escape(f"{predicted}, not {truth}")
        items.append(f"<li>{_compressed(to_picture(image))}{title}</li>")
    caption = "The wrong predictions that are most certain: predicted class, not the true one."
    return Look("Most confident mistakes", caption, f'<ul class="sheet">{"".join(items)}</ul>')


# ---------------------------------------------------------------- images


def images_of(examples: Examples, indices: Tensor) -> Tensor:
    """Read images (B, C, H, W) in [0, 1]."""
    (batch,) = examples.batches([indices], CPU)
    return to_float(batch.inputs)


def image_of(columns: Mapping[str, Tensor]) -> str:
    """Draw columns of images as an img element; see `draw_sheet`."""
    return _compressed(draw_sheet(columns))


def _compressed(picture: Image.Image) -> str:
    """Return an img element of a PNG with at most 256 colors."""
    out = io.BytesIO()
    picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(out, "PNG", optimize=True)
    return embed(out.getvalue(), "png")


def picture_of(path: Path, widest: int = 1600) -> str:
    """Read a picture of a run's folder as an img element, made smaller if it is wide."""
    if path.suffix.lower() == ".svg" or path.stat().st_size < SMALL:
        return embed(path.read_bytes(), KINDS[path.suffix.lower()])
    with Image.open(path) as image:
        image.thumbnail((widest, widest))
        return _compressed(image.convert("RGB"))


def embed(content: bytes, kind: str) -> str:
    """Return an img element with the content of a picture."""
    data = base64.b64encode(content).decode()
    return f'<img alt="" src="data:image/{kind};base64,{data}">'
