"""Starter recipes: written for the user's data, commented, and small enough for a laptop."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from sslrun.data.source import sources
from sslrun.data.stores import IMAGE_SUFFIXES, FileStore, FolderStore, find_files
from sslrun.errors import UserError
from sslrun.files import walk
from sslrun.runs import report_unwritable

SIDES = (16, 32, 64, 96, 128, 224)
"""Image sides that a starter recipe chooses from, in pixels."""
INSPECTED = 200
"""Largest number of images or values that are inspected."""
PRETRAINING = 60_000
"""Approximate number of examples that a starter recipe's pretraining reads: minutes on a CPU."""
TABLES = tuple(FileStore.FORMATS)
TEXT_COLUMNS = (
    "text",
    "sentence",
    "review",
    "content",
    "body",
    "document",
    "tweet",
    "comment",
    "title",
)
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
LABEL_COLUMNS = ("label", "class", "category", "target", "sentiment", "labels")
PATH_COLUMNS = ("path", "image", "file", "filename", "file_name")


@dataclass(frozen=True)
class DataSummary:
    """What a starter recipe needs to know about the user's data."""

    kind: str
    """Either "images" or "text"."""
    data: str
    """The value of `data` for pretraining, as YAML."""
    count: int
    """Examples in the training split."""
    classes: int = 0
    """Number of classes; 0 without labels."""
    side: int = 16
    """Side of the images in pixels, after reading."""
    task_data: str | None = None
    """The value of `data` for the evaluation; None: the same as for pretraining."""
    regression: bool = False
    """Whether the label is a number to predict."""
    flip: bool = True
    """Whether to mirror images at random; False if left and right differ, as in digits."""
    about: str = ""
    """A description of the data in words."""


def write_starter(name: str, text: bool, path: Path | None) -> Path:
    """Write NAME.yaml and return its path.

    The recipe is for the data at `path`, or by default for data that need no download. Raises
    UserError if the file exists, the name is not valid for a recipe, or `path` holds no known kind
    of data.
    """
    target = Path(name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", target.stem):
        raise UserError(
            f"{target.stem}: a recipe's name has letters, digits, '.', '_' and '-'; "
            "choose another name"
        )
    if target.exists():
        raise UserError(f"{target}: is there already; choose another name, or remove it")
    default = _TEXT if text else _IMAGES
    summary = default if path is None else inspect_data(path, text)
    render = render_text if summary.kind == "text" else render_images
    recipe = render(target.stem, summary)
    with (
        report_unwritable(target, "choose another place"),
        open(target, "x", encoding="utf-8") as file,
    ):
        file.write(recipe)
    return target


_IMAGES = DataSummary(
    kind="images",
    data="{name: digits, size: 16}",
    count=1_210,
    classes=10,
    flip=False,
    about="1,797 scanned digits that come with scikit-learn. "
    "For images of your own: {name: folder, path: photos, size: 64}",
)
_TEXT = DataSummary(
    kind="text",
    data="{name: world, documents: 400, length: 32, tokenizer: {vocab: 800}}",
    count=2_000,
    classes=2,
    task_data="{name: world-sentiment, train: 400, held_out: 200}",
    about="a small world described in English, generated locally. "
    "For text of your own: {name: text, path: texts}",
)


# ---------------------------------------------------------------- inspecting data


def inspect_data(path: Path, text: bool = False) -> DataSummary:
    """Summarize a user's data.

    Raises UserError if the path does not exist or holds no known kind of data.
    """
    if not path.exists():
        raise UserError(f"--from {path}: no such file or folder")
    files = [path] if path.is_file() else list(map(Path, walk(path)))
    suffixes = Counter(file.suffix.lower() for file in files)
    if path.is_dir() and not text and any(suffixes[suffix] for suffix in IMAGE_SUFFIXES):
        return _summarize_image_folder(path)
    if any(suffixes[suffix] for suffix in TABLES):
        return _summarize_table(path, text)
    if suffixes[".txt"]:
        return _summarize_text_files(path, [file for file in files if file.suffix == ".txt"])
    kinds = ", ".join((".png", ".jpg", ".jpeg", ".txt", *TABLES))
    raise UserError(
        f"--from {path}: found neither images nor text ({kinds}); name a folder or a file of those"
    )


def _summarize_image_folder(path: Path) -> DataSummary:
    split = FolderStore(path).open("train")
    names = sorted(map(Path, find_files(path, IMAGE_SUFFIXES)))
    side = _side(names)
    data = f"{{name: folder, path: {_quote(path)}, size: {side}}}"
    count, classes = len(split.images), len(split.classes) if split.labels is not None else 0
    about = f"{count:,} images" + (f" of {classes} classes" if classes else ", without labels")
    return DataSummary("images", data, count, classes, side, about=about)


def _side(files: Sequence[Path]) -> int:
    """Choose the largest of SIDES that is not above the median side of some images.

    Raises UserError if none of them can be opened.
    """
    from PIL import Image, UnidentifiedImageError

    shorter = []
    for file in files[:: math.ceil(len(files) / INSPECTED)]:
        try:
            with Image.open(file) as image:
                shorter.append(min(image.size))
        except (OSError, UnidentifiedImageError):
            continue
    if not shorter:
        raise UserError(
            f"{files[0]}: cannot be read as an image, nor can the others; "
            "convert them to PNG or JPEG"
        )
    middle = median(shorter)
    return max((side for side in SIDES if side <= middle), default=SIDES[0])


def _summarize_table(path: Path, text: bool) -> DataSummary:
    table = FileStore(path).table("train")
    columns = table.column_names
    if not len(table):
        raise UserError(f"--from {path}: has no rows")
    strings = {name: values for name in columns if (values := _text_values(table[name]))}
    images = next((name for name in PATH_COLUMNS if _are_images(strings.get(name, ()))), None)
    if images is not None and not text:
        return _summarize_listed_images(path, images, columns, table)
    if not strings:
        raise UserError(
            f"--from {path}: no column holds text, only {', '.join(columns)}; add one, named text"
        )
    return _summarize_texts(path, table, strings)


def _summarize_texts(path: Path, table: Any, strings: dict[str, list[str]]) -> DataSummary:
    """Summarize a table of texts. `strings`: column of strings -> some of its values."""
    count = len(table)
    label = _label_column(table, table.column_names)
    pair = next((pair for pair in PAIRS if {*pair} <= strings.keys()), None)
    if pair is not None:
        first = pair[0]
    else:
        texts = {name: values for name, values in strings.items() if name != label}
        first = _text_column(texts, path)
    length = _choose_length(strings[first], 2 if pair else 1)
    options = f"column: {_quote(first)}, length: {length}, tokenizer: {{vocab: {_vocab(count)}}}"
    data = f"{{name: text, path: {_quote(path)}, {options}}}"
    about = f"{count:,} texts in the column {first}"
    if label is None:
        return DataSummary("text", data, count, about=f"{about}, without labels")
    regression = any(isinstance(value, float) and value % 1 for value in table[label])
    columns = f"first: {_quote(first)}, label: {_quote(label)}"
    columns += f", second: {_quote(pair[1])}" if pair else ""
    columns += ", regression: true" if regression else ""
    return DataSummary(
        "text",
        data,
        count,
        classes=1 if regression else len({*table[label]}),
        task_data=f"{{name: sentences, path: {_quote(path)}, {columns}}}",
        regression=regression,
        about=f"{about}, their labels in the column {label}",
    )


def _choose_length(texts: Sequence[str], sentences: int) -> int:
    """Choose a sequence length, a multiple of 16 in [16, 256], that fits 95 % of the texts.

    Assumes 1.5 tokens per word. `sentences` is the number of texts in a sequence.
    """
    words = sorted(len(text.split()) for text in texts)
    tokens = 1.5 * words[int(0.95 * (len(words) - 1))] * sentences
    return min(256, max(16, 16 * math.ceil(tokens / 16)))


def _vocab(texts: int) -> int:
    """Choose a vocabulary size for a number of texts."""
    return 8_000 if texts >= 2_000 else 1_000


def _text_values(values: Any) -> list[str]:
    """Return some values of a column if it holds text; none otherwise."""
    some = [value for value in list(values[:INSPECTED]) if value is not None]
    return some if some and all(isinstance(value, str) for value in some) else []


def _are_images(values: Sequence[str]) -> bool:
    return bool(values) and all(value.lower().endswith(IMAGE_SUFFIXES) for value in values)


def _text_column(strings: dict[str, list[str]], path: Path) -> str:
    """Find the column of texts: one with a known name, else the one with the longest values."""
    if not strings:
        raise UserError(f"--from {path}: has labels, but no column of text; add one, named text")
    known = next((name for name in TEXT_COLUMNS if name in strings), None)
    return known or max(strings, key=lambda name: sum(map(len, strings[name])) / len(strings[name]))


def _label_column(table: Any, columns: Sequence[str]) -> str | None:
    """Find the column of labels: one with a known name, else the last one with few values."""
    known = next((name for name in LABEL_COLUMNS if name in columns), None)
    if known:
        return known
    most = min(50, len(table) // 5)
    few = [name for name in columns if 2 <= len({*map(str, table[name])}) <= most]
    return few[-1] if few else None


def _summarize_listed_images(
    path: Path, image: str, columns: Sequence[str], table: Any
) -> DataSummary:
    """Summarize images whose paths are listed in a table."""
    if "csv-images" not in sources:
        raise UserError(
            f"--from {path}: lists images; put them in folders, <class>/<image>, "
            "and name that folder"
        )
    folder = path if path.is_dir() else path.parent
    side = _side([folder / value for value in table[image]])
    label = _label_column(table, [name for name in columns if name != image])
    named = f", image: {_quote(image)}" if image != "path" else ""
    named += f", label: {_quote(label)}" if label and label != "label" else ""
    data = f"{{name: csv-images, path: {_quote(path)}{named}, size: {side}}}"
    classes = len({*table[label]}) if label else 0
    about = f"{len(table):,} images" + (f" of {classes} classes" if classes else ", without labels")
    return DataSummary("images", data, len(table), classes, side, about=about)


def _summarize_text_files(path: Path, files: Sequence[Path]) -> DataSummary:
    lines = sum(
        1
        for file in files
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
        if line
    )
    options = f"length: 64, tokenizer: {{vocab: {_vocab(lines)}}}"
    data = f"{{name: text, path: {_quote(path)}, {options}}}"
    about = f"{lines:,} lines of text, without labels"
    return DataSummary("text", data, max(1, lines // 4), about=about)


def _quote(value: Path | str) -> str:
    """Write a string as YAML, without quotes if YAML cannot misread it."""
    text = str(value)
    bare = re.fullmatch(r"[A-Za-z][\w./-]*", text) and text not in ("true", "false", "null")
    return text if bare else json.dumps(text)


# ---------------------------------------------------------------- writing recipes


def render_images(name: str, summary: DataSummary) -> str:
    """Write a starter recipe for images."""
    batch, epochs = _schedule(summary.count)
    crop = 0.3 if summary.side < 64 else 0.2
    stem = "small" if summary.side <= 64 else "large"
    flip, note = "flip: 0.5, ", "flip: 0 if left and right differ"
    if not summary.flip:
        flip, note = "", "add flip: 0.5 for images that may be mirrored; digits may not"
    task = "{augmentation: {crop: [0.6, 1.0]" + (", flip: 0.5" if summary.flip else "") + "}}"
    small = "; small images keep their detail with stem: small" if stem == "small" else ""
    return f"""\
# {summary.about}.
# Check it:  sslrun check {name}.yaml      Run it:  sslrun sweep {name}.yaml
name: {name}
data: &data {summary.data}

# The network{small}. Others: sslrun show backbone
backbone: {{name: resnet18, stem: {stem}, channels: 32}}  # 64 channels are the full width

# The pretext task, learned without labels. Others: sslrun show pretext
pretext:
  name: simclr
  temperature: 0.5
  # {note}
  augmentation: {{crop: [{crop}, 1.0], {flip}jitter: [0.4, 0.4, 0.4, 0.1], gray: 0.2}}

# The schedule of pretraining. More epochs usually help.
# All options: sslrun show section pretrain
pretrain:
  {{epochs: {epochs}, batch: {batch}, optimizer: adamw, lr: 0.001, weight_decay: 0.01, warmup: 1}}
{_evaluation(summary, task)}"""


def render_text(name: str, summary: DataSummary) -> str:
    """Write a starter recipe for text."""
    batch, epochs = _schedule(summary.count)
    return f"""\
# {summary.about}.
# Check it:  sslrun check {name}.yaml      Run it:  sslrun sweep {name}.yaml
name: {name}
data: &data {summary.data}

# The network: bert-tiny has 2 layers, bert-mini 4, bert-small 4 wider ones.
# Others: sslrun show backbone
backbone: bert-tiny

# The pretext task, learned without labels: fill in masked words. Others: sslrun show pretext
pretext: mlm

# The schedule of pretraining. More epochs usually help.
# All options: sslrun show section pretrain
pretrain:
  {{epochs: {epochs}, batch: {batch}, optimizer: adamw, lr: 0.001, weight_decay: 0.01, warmup: 1}}
{_evaluation(summary, None)}"""


def _schedule(count: int) -> tuple[int, int]:
    """Choose batch and epochs of pretraining; up to a third of `count` examples is held out."""
    kept = max(2, round(0.65 * count))
    batch = min(128, 2 ** int(math.log2(max(2, kept // 2))))
    return batch, max(1, min(200, round(PRETRAINING / count)))


def _evaluation(summary: DataSummary, task: str | None) -> str:
    """Write the section of evaluations, or a note on how to add one."""
    if not summary.classes:
        return """
# There are no labels to evaluate on. With labeled data, add:
#   evaluate: {mine: {data: {...}, protocols: [knn, probe]}}
"""
    few = 0.1 if summary.regression or 0.1 * 0.65 * summary.count >= 2 * summary.classes else None
    labels = f"[{few}, 1.0]" if few else "[1.0]"
    steps = 300 if summary.count >= 1_000 else 100
    frozen = "probe" if summary.regression else "knn, probe"
    lines = [
        "",
        "# How good the features are: nearest neighbors and a linear classifier on the frozen",
        "# features, and fine-tuning; scratch is the same network without pretraining.",
        "# Others: sslrun show protocol",
        "evaluate:",
        "  mine:",
        f"    data: {summary.task_data or '*data'}",
        f"    protocols: [{frozen}, finetune, scratch]",
        f"    labels: {labels}  # shares of the training labels",
        *([f"    task: {task}"] if task else []),
        "# scratch is trained with these options too",
        f"finetune: {{steps: {steps}, batch: 32, optimizer: adamw, lr: 0.001}}",
        "",
    ]
    return "\n".join(lines)
