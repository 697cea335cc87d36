"""Starter recipes: written for the data at hand, commented, and small enough to run on a laptop."""

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
from sslrun.data.stores import IMAGE_SUFFIXES, FileStore, FolderStore
from sslrun.errors import UserError
from sslrun.runs import report_unwritable

SIDES = (16, 32, 64, 96, 128, 224)
"""Sides of images that a starter recipe chooses from, in pixels."""
LOOKED_AT = 200
"""Images whose size is looked at."""
PRETRAINING = 60_000
"""Examples that a starter recipe's pretraining reads in all, about: minutes on a CPU."""
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
class Found:
    """What a look at a user's data found."""

    kind: str
    """images or text."""
    data: str
    """The mapping of `data` for pretraining, as YAML."""
    count: int
    """Examples in the training split."""
    classes: int = 0
    """Classes of the labels; 0: there are no labels."""
    side: int = 16
    """Side of the images, as they are read."""
    task_data: str | None = None
    """The mapping of `data` for the evaluation where it is not that of pretraining."""
    regression: bool = False
    """The label is a number to predict."""
    flip: bool = True
    """Mirror images at random; False if left and right differ, as in digits."""
    about: str = ""
    """What was found, in words."""


def write_starter(name: str, text: bool, path: Path | None) -> Path:
    """Write NAME.yaml, for the data at `path` or for data that need no download, and return its path.

    UserError: the file is there already, the name cannot be a recipe's, or `path` holds nothing
    that is known.
    """
    target = Path(name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", target.stem):
        raise UserError(
            f"{target.stem}: a recipe's name has letters, digits, '.', '_' and '-'; choose another name"
        )
    if target.exists():
        raise UserError(f"{target}: is there already; choose another name, or remove it")
    found = look_at(path, text) if path is not None else _TEXT if text else _IMAGES
    recipe = (
        render_text(target.stem, found)
        if found.kind == "text"
        else render_images(target.stem, found)
    )
    with (
        report_unwritable(target, "choose another place"),
        open(target, "x", encoding="utf-8") as file,
    ):
        file.write(recipe)
    return target


_IMAGES = Found(
    "images", "{name: digits, size: 16}", 1_210, 10, 16, flip=False,
    about="1,797 scanned digits that come with scikit-learn. For images of your own: {name: folder, path: photos, size: 64}",
)  # fmt: skip
_TEXT = Found(
    "text", "{name: world, documents: 400, length: 32, tokenizer: {vocab: 800}}", 2_000, 2,
    task_data="{name: world-sentiment, train: 400, held_out: 200}",
    about="a small world told in English, made here. For text of your own: {name: text, path: texts}",
)  # fmt: skip


# ---------------------------------------------------------------- looking at data


def look_at(path: Path, text: bool = False) -> Found:
    """Find out what a user's data are. UserError: they are not there, or of no kind that is known."""
    if not path.exists():
        raise UserError(f"--from {path}: no such file or folder")
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    suffixes = Counter(file.suffix.lower() for file in files)
    if path.is_dir() and not text and any(suffixes[suffix] for suffix in IMAGE_SUFFIXES):
        return _folder_of_images(path)
    if any(suffixes[suffix] for suffix in TABLES):
        return _table(path, text)
    if suffixes[".txt"]:
        return _text_files(path, [file for file in files if file.suffix == ".txt"])
    kinds = ", ".join((".png", ".jpg", ".jpeg", ".txt", *TABLES))
    raise UserError(
        f"--from {path}: found neither images nor text ({kinds}); name a folder or a file of those"
    )


def _folder_of_images(path: Path) -> Found:
    split = FolderStore(path).open("train")
    names = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in IMAGE_SUFFIXES]
    side = _side(names)
    data = f"{{name: folder, path: {_quoted(path)}, size: {side}}}"
    count, classes = len(split.images), len(split.classes) if split.labels is not None else 0
    about = f"{count:,} images" + (f" of {classes} classes" if classes else ", without labels")
    return Found("images", data, count, classes, side, about=about)


def _side(files: Sequence[Path]) -> int:
    """The largest of SIDES that the middle one of some images has. UserError: none of them can be opened."""
    from PIL import Image, UnidentifiedImageError

    shorter = []
    for file in files[:: math.ceil(len(files) / LOOKED_AT)]:
        try:
            with Image.open(file) as image:
                shorter.append(min(image.size))
        except (OSError, UnidentifiedImageError):
            continue
    if not shorter:
        raise UserError(
            f"{files[0]}: cannot be read as an image, nor can the others; convert them to PNG or JPEG"
        )
    middle = median(shorter)
    return max((side for side in SIDES if side <= middle), default=SIDES[0])


def _table(path: Path, text: bool) -> Found:
    table = FileStore(path).table("train")
    columns, count = table.column_names, len(table)
    if not count:
        raise UserError(f"--from {path}: has no rows")
    strings = {name: values for name in columns if (values := _strings(table[name]))}
    images = next((name for name in PATH_COLUMNS if _are_images(strings.get(name, ()))), None)
    if images is not None and not text:
        return _listed_images(path, images, columns, table)
    if not strings:
        raise UserError(
            f"--from {path}: no column holds text, only {', '.join(columns)}; add one, named text"
        )
    label = _label_column(table, columns)
    pair = next((pair for pair in PAIRS if {*pair} <= strings.keys()), None)
    first = (
        pair[0]
        if pair
        else _text_column({name: each for name, each in strings.items() if name != label}, path)
    )
    words = sorted(len(value.split()) for value in strings[first])
    length = min(
        256,
        max(
            16, 16 * math.ceil(1.5 * words[int(0.95 * (len(words) - 1))] * (2 if pair else 1) / 16)
        ),
    )
    vocab = 8_000 if count >= 2_000 else 1_000
    data = f"{{name: text, path: {_quoted(path)}, column: {_quoted(first)}, length: {length}, tokenizer: {{vocab: {vocab}}}}}"
    if label is None:
        return Found(
            "text", data, count, about=f"{count:,} texts in the column {first}, without labels"
        )
    regression = any(isinstance(value, float) and value % 1 for value in table[label])
    extra = (f", second: {_quoted(pair[1])}" if pair else "") + (
        ", regression: true" if regression else ""
    )
    task = f"{{name: sentences, path: {_quoted(path)}, first: {_quoted(first)}, label: {_quoted(label)}{extra}}}"
    classes = 1 if regression else len({*table[label]})
    return Found(
        "text", data, count, classes, task_data=task, regression=regression,
        about=f"{count:,} texts in the column {first}, their labels in the column {label}",
    )  # fmt: skip


def _strings(values: Any) -> list[str]:
    """Some values of a column if it holds text; none otherwise."""
    some = [value for value in list(values[:LOOKED_AT]) if value is not None]
    return some if some and all(isinstance(value, str) for value in some) else []


def _are_images(values: Sequence[str]) -> bool:
    return bool(values) and all(value.lower().endswith(IMAGE_SUFFIXES) for value in values)


def _text_column(strings: dict[str, list[str]], path: Path) -> str:
    """The column of texts: one of a known name, or else the one whose values are longest."""
    if not strings:
        raise UserError(f"--from {path}: has labels, but no column of text; add one, named text")
    known = next((name for name in TEXT_COLUMNS if name in strings), None)
    return known or max(strings, key=lambda name: sum(map(len, strings[name])) / len(strings[name]))


def _label_column(table: Any, columns: Sequence[str]) -> str | None:
    """The column of labels: one of a known name, or else the last one with few values; None: there is none."""
    known = next((name for name in LABEL_COLUMNS if name in columns), None)
    if known:
        return known
    few = [
        name for name in columns if 2 <= len({*map(str, table[name])}) <= min(50, len(table) // 5)
    ]
    return few[-1] if few else None


def _listed_images(path: Path, image: str, columns: Sequence[str], table: Any) -> Found:
    """Images whose paths a table lists."""
    if "csv-images" not in sources:
        raise UserError(
            f"--from {path}: lists images; put them in folders, <class>/<image>, and name that folder"
        )
    folder = path if path.is_dir() else path.parent
    side = _side([folder / value for value in table[image]])
    label = _label_column(table, [name for name in columns if name != image])
    named = f", image: {_quoted(image)}" if image != "path" else ""
    named += f", label: {_quoted(label)}" if label and label != "label" else ""
    data = f"{{name: csv-images, path: {_quoted(path)}{named}, size: {side}}}"
    classes = len({*table[label]}) if label else 0
    about = f"{len(table):,} images" + (f" of {classes} classes" if classes else ", without labels")
    return Found("images", data, len(table), classes, side, about=about)


def _text_files(path: Path, files: Sequence[Path]) -> Found:
    lines = sum(
        1
        for file in files
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
        if line
    )
    vocab = 8_000 if lines >= 2_000 else 1_000
    data = f"{{name: text, path: {_quoted(path)}, length: 64, tokenizer: {{vocab: {vocab}}}}}"
    return Found("text", data, max(1, lines // 4), about=f"{lines:,} lines of text, without labels")


def _quoted(value: Path | str) -> str:
    """A string as YAML has it: bare where nothing in it can be misread."""
    text = str(value)
    return (
        text
        if re.fullmatch(r"[A-Za-z][\w./-]*", text) and text not in ("true", "false", "null")
        else json.dumps(text)
    )


# ---------------------------------------------------------------- writing recipes


def render_images(name: str, found: Found) -> str:
    """A starter recipe for images."""
    batch, epochs = _schedule(found.count)
    crop = 0.3 if found.side < 64 else 0.2
    stem = "small" if found.side <= 64 else "large"
    flip, note = "flip: 0.5, ", "flip: 0 where left and right differ"
    if not found.flip:
        flip, note = "", "add flip: 0.5 for images that may be mirrored; digits may not"
    task = "{augmentation: {crop: [0.6, 1.0]" + (", flip: 0.5" if found.flip else "") + "}}"
    small = "; small images keep their detail with stem: small" if stem == "small" else ""
    return f"""\
# {found.about}.
# Check it:  sslrun check {name}.yaml      Run it:  sslrun sweep {name}.yaml
name: {name}
data: &data {found.data}

# The network{small}. Others: sslrun show backbone
backbone: {{name: resnet18, stem: {stem}, channels: 32}}  # 64 channels are the full width

# What it learns without labels. Others: sslrun show pretext
pretext:
  name: simclr
  temperature: 0.5
  augmentation: {{crop: [{crop}, 1.0], {flip}jitter: [0.4, 0.4, 0.4, 0.1], gray: 0.2}}  # {note}

# The schedule of that. More epochs usually help; all options: sslrun show section pretrain
pretrain: {{epochs: {epochs}, batch: {batch}, optimizer: adamw, lr: 0.001, weight_decay: 0.01, warmup: 1}}
{_evaluation(found, task)}"""


def render_text(name: str, found: Found) -> str:
    """A starter recipe for text."""
    batch, epochs = _schedule(found.count)
    return f"""\
# {found.about}.
# Check it:  sslrun check {name}.yaml      Run it:  sslrun sweep {name}.yaml
name: {name}
data: &data {found.data}

# The network: bert-tiny has 2 layers, bert-mini 4, bert-small 4 wider ones. Others: sslrun show backbone
backbone: bert-tiny

# What it learns without labels: to fill in masked words. Others: sslrun show pretext
pretext: mlm

# The schedule of that. More epochs usually help; all options: sslrun show section pretrain
pretrain: {{epochs: {epochs}, batch: {batch}, optimizer: adamw, lr: 0.001, weight_decay: 0.01, warmup: 1}}
{_evaluation(found, None)}"""


def _schedule(count: int) -> tuple[int, int]:
    """Batch and epochs of pretraining on `count` examples; up to a third of them may be held out."""
    kept = max(2, round(0.65 * count))
    batch = min(128, 2 ** int(math.log2(max(2, kept // 2))))
    return batch, max(1, min(200, round(PRETRAINING / count)))


def _evaluation(found: Found, task: str | None) -> str:
    """The section of evaluations, or a note on how to add one."""
    if not found.classes:
        return """
# There are no labels to evaluate on. With labeled data, add:
#   evaluate: {mine: {data: {...}, protocols: [knn, probe]}}
"""
    few = 0.1 if found.regression or 0.1 * 0.65 * found.count >= 2 * found.classes else None
    labels = f"[{few}, 1.0]" if few else "[1.0]"
    steps = 300 if found.count >= 1_000 else 100
    frozen = "probe" if found.regression else "knn, probe"
    lines = [
        "",
        "# What its features are worth: by nearest neighbors and a linear classifier on the frozen features, and by",
        "# fine-tuning; scratch is the same network without pretraining. Others: sslrun show protocol",
        "evaluate:",
        "  mine:",
        f"    data: {found.task_data or '*data'}",
        f"    protocols: [{frozen}, finetune, scratch]",
        f"    labels: {labels}  # shares of the training labels",
        *([f"    task: {task}"] if task else []),
        f"finetune: {{steps: {steps}, batch: 32, optimizer: adamw, lr: 0.001}}  # scratch is trained alike",
        "",
    ]
    return "\n".join(lines)
