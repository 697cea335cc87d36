"""Measure the memory that large data sets take, on synthetic data of any size.

python benchmarks/memory.py
python benchmarks/memory.py --full

Each row is a step of a process that this one watches. Images are streamed, and are links to a few
files, so that they take little space on the disk. Texts are words with Zipf's law.

- folder, shards, parquet, csv-images: `hash` identifies the files, as each command does, `index`
  lists the images and finds their labels, and `read` decodes some batches of an epoch in random
  order in two worker processes;
- text: `train` trains a tokenizer, which counts every different word; `tokenize` writes the tokens;
- tokens: pretraining from the tokens of a large corpus, which are written directly because
  tokenizing takes hours: `mlm` and `ltr` on packed text, `pairs` on BERT's pairs. It includes
  carving the held-out documents, building the pairs, their order, feature checks and a checkpoint.

Columns are the size of the set, the peak of all memory of the process and its workers (Pss: shared
pages count once), and the peak of the part that is not mapped from files. The system can drop
mapped pages at any time, so that the last column is what a machine needs.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SIDE = 224
BATCH = 256
SEQUENCES = 32
"""Sequences in a batch: few, because only the memory that the data take is measured."""
CLASSES = 1000
LINKS = 50_000
"""Hard links to one file; file systems allow about 65,000."""
SHARD = 10_000
"""Images in a shard, and rows in a file of a table."""
FILE_MB = 100
"""Megabytes in a file of text."""
TOKEN_BYTES = 4.5
"""Bytes of text for each token: our assumption, typical of English and 30,000 entries."""
FULL = {"images": [1_300_000], "text_gb": [1.0], "tokens_gb": [10.0]}
"""The sizes of `--full`."""
VOCAB = 2000


# ---------------------------------------------------------------- synthetic data


def encode(seed: int, size: tuple[int, int] = (320, 240)) -> bytes:
    """Return a JPEG file, of 10 to 20 kB at the default size."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(file, "jpeg")
    return file.getvalue()


def write_folder(root: Path, count: int) -> Path:
    """Write root/<class>/<number>.JPEG, and return `root`."""
    for number in range(CLASSES):
        (root / f"n{number:08}").mkdir(parents=True)
    for index in range(count):
        if index % LINKS == 0:
            content = root.with_name(f"image{index}")
            content.write_bytes(encode(index))
        label = index % CLASSES
        os.link(content, root / f"n{label:08}" / f"n{label:08}_{index:08}.JPEG")
    return root


def write_list(root: Path, count: int) -> Path:
    """Write a folder of images and the CSV file that lists them; return the file."""
    write_folder(root, count)
    table = root / "list.csv"
    with open(table, "w") as rows:
        rows.write("path,label\n")
        for index in range(count):
            name = f"n{index % CLASSES:08}"
            rows.write(f"{name}/{name}_{index:08}.JPEG,{name}\n")
    return table


def write_shards(root: Path, count: int) -> Path:
    """Write shards of `SHARD` images with equal content, and return their pattern."""
    import tarfile

    root.mkdir()
    content = encode(0)
    first = root / "train-0000.tar"
    with tarfile.open(first, "w") as tar:
        for index in range(SHARD):
            for ending, part in (("jpg", content), ("cls", b"%d" % (index % CLASSES))):
                info = tarfile.TarInfo(f"n{index % CLASSES:08}_{index:08}.{ending}")
                info.size = len(part)
                tar.addfile(info, io.BytesIO(part))
    for number in range(1, -(-count // SHARD)):
        os.link(first, root / f"train-{number:04}.tar")
    return root / "*.tar"


def write_parquet(root: Path, count: int) -> Path:
    """Write tables of `SHARD` tiny images with equal content, and return their pattern.

    They are tiny because reading copies them into the cache.
    """
    import pyarrow
    from pyarrow import parquet

    root.mkdir()
    content = encode(0, (32, 24))
    images = [{"bytes": content, "path": f"{index:08}.JPEG"} for index in range(SHARD)]
    labels = [index % CLASSES for index in range(SHARD)]
    first = root / "train-0000.parquet"
    parquet.write_table(pyarrow.table({"image": images, "label": labels}), first)
    for number in range(1, -(-count // SHARD)):
        os.link(first, root / f"train-{number:04}.parquet")
    return root / "*.parquet"


def write_texts(root: Path, megabytes: int) -> Path:
    """Write documents of 20 sentences of 15 words, and return `root`."""
    root.mkdir()
    draw = np.random.default_rng(0)
    letters = draw.integers(ord("a"), ord("z") + 1, (1_000_000, 6), dtype=np.uint8)
    lexicon = letters.view("S6")[:, 0].astype("U6")
    for start in range(0, megabytes, FILE_MB):
        with open(root / f"{start:06}.txt", "w") as file:
            goal = min(FILE_MB, megabytes - start) * 10**6
            while file.tell() < goal:
                words = lexicon[draw.zipf(1.4, (20 * 100, 15)) % len(lexicon)]
                for number, sentence in enumerate(words):
                    file.write(" ".join(sentence) + ("\n\n" if number % 20 == 19 else "\n"))
    return root


def write_tokens(root: Path, megabytes: int) -> Path:
    """Write a megabyte of texts, and into the cache the tokens of `megabytes`; return `root`.

    The documents have 5 to 35 sentences of 5 to 45 tokens. A thousand are drawn, and repeated.
    """
    from sslrun.data.text.corpora import PARTS
    from sslrun.files import SUMS, checksum, write_sums

    folder = open_text(str(write_texts(root, 1))).folder
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    documents = draw.integers(5, 36, 1000).cumsum()
    sentences = draw.integers(5, 46, documents[-1]).cumsum()
    tokens = draw.integers(5, VOCAB, sentences[-1])
    # Each repetition continues the numbers of the one before.
    block = {"tokens": (tokens, 0), "sentences": (sentences, sentences[-1])}
    block["documents"] = (documents, documents[-1])
    for name, (values, shift) in block.items():
        kind, zeros = PARTS[name]
        with open(folder / name, "wb") as file:
            file.write(bytes(zeros * kind.itemsize))
            for number in range(round(megabytes * 10**6 / TOKEN_BYTES / len(tokens))):
                file.write((values + number * shift).astype(kind).tobytes())
    write_sums(folder / SUMS, {name: checksum(folder / name) for name in PARTS})
    return root


# ---------------------------------------------------------------- steps, each in a process


def read_batches(examples: Any, steps: int) -> None:
    """Read the first batches of an epoch."""
    import torch

    order = examples.order(0, 0)[: steps * BATCH]
    for _ in examples.batches(order.split(BATCH), torch.device("cpu")):
        pass


def measure_images(name: str, path: str, steps: int, step: Connection) -> None:
    from sslrun.data.image import images
    from sslrun.data.source import sources
    from sslrun.runs import hash_contents

    images.MAX_TENSOR_BYTES = 0  # stream sets of any size
    kind = name if name in ("folder", "csv-images") else "shards"
    cls = sources[kind]
    options = cls.Options(size=SIDE, **{"train" if kind == "shards" else "path": path})
    step.send("hash")
    for file in options.files():
        hash_contents(file)
    step.send("index")
    examples = cls(options).load("train")
    assert examples.labels is not None
    step.send("read")
    read_batches(examples, steps)


def describe_text(path: str) -> dict[str, Any]:
    """Return the options of the texts at `path`."""
    return {"path": path, "length": 128, "tokenizer": {"vocab": VOCAB}}


def open_text(path: str) -> Any:
    """Return the set with its tokenizer, which is trained if the cache has none."""
    import sslrun.data  # noqa: F401
    from sslrun.data.source import sources

    cls = sources["text"]
    source = cls(cls.Options(**describe_text(path)))
    assert source.spec.vocabulary
    return source


def measure_training(name: str, path: str, steps: int, step: Connection) -> None:
    step.send("train")
    open_text(path)


def measure_tokenizing(name: str, path: str, steps: int, step: Connection) -> None:
    source = open_text(path)
    step.send("tokenize")
    source.load("train")


def measure_pretraining(
    title: str, pretext: dict[str, Any], name: str, path: str, steps: int, step: Connection
) -> None:
    from sslrun.recipe import parse
    from sslrun.recipe.places import Located
    from sslrun.stages.context import Context
    from sslrun.stages.pretrain import Pretraining
    from sslrun.stages.reporting import Reporter
    from sslrun.training.device import compute

    backbone = "gpt-tiny" if pretext["name"] == "ltr" else "bert-tiny"
    recipe = {
        "name": "memory",
        "backbone": backbone,
        "pretext": pretext,
        "data": {"name": "text", **describe_text(path)},
        "pretrain": {"steps": steps, "batch": SEQUENCES, "lr": 0.001},
        "watch": {"examples": 64},
    }
    runs = Path(path).with_name("runs")
    context = Context(runs, compute("cpu"), Reporter(quiet=True))
    step.send(title)
    Pretraining(parse(Located(recipe, {(): "memory.yaml:1"})), 0, runs).execute(context)


PRETEXTS = {
    "mlm": {"name": "mlm", "pairs": "drop"},
    "ltr": {"name": "ltr", "pairs": "drop"},
    "pairs": {"name": "mlm", "nsp": True, "pairs": "keep"},
}
"""Step of pretraining -> its task."""


# ---------------------------------------------------------------- measuring


class Peak(NamedTuple):
    """Memory of a process and its children, in bytes."""

    total: int = 0
    own: int = 0
    """Without pages mapped from files."""


def find_processes(pid: int) -> Iterator[int]:
    yield pid
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield from find_processes(int(child))


def measure(pid: int) -> Peak:
    total, own = 0, 0
    with suppress(OSError):  # a process that has ended
        for process in find_processes(pid):
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
            sizes = {
                key: int(rest.split()[0])
                for key, _, rest in (line.partition(":") for line in lines)
            }
            total += sizes["Pss"] * 1024
            own += (sizes["Pss_Anon"] + sizes["Pss_Shmem"]) * 1024
    return Peak(total, own)


def run(function: Any, name: str, path: Path, steps: int) -> dict[str, Peak]:
    """Run a function in a new process, and return the peak of each of its steps."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(name, str(path), steps, there))
    process.start()
    there.close()
    peaks: dict[str, Peak] = {}
    step = "import"
    while True:
        start = time.monotonic()
        now, before = measure(process.pid or 0), peaks.get(step, Peak())
        peaks[step] = Peak(max(before.total, now.total), max(before.own, now.own))
        taken = time.monotonic() - start  # long if many pages are mapped, which halts the process
        try:
            if here.poll(max(0.1, 4 * taken)):
                step = here.recv()
        except EOFError:
            break
    process.join()
    if process.exitcode:
        raise SystemExit(f"{name}: failed")
    return peaks


def report(
    write: Any, functions: Sequence[Any], name: str, size: int, unit: str, steps: int
) -> None:
    """Write a set, and print a row for each step of the functions.

    The functions run in this order, each in a process of its own, with one cache.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SSLRUN_CACHE"] = f"{folder}/cache"
        path = write(Path(folder) / "data", size)
        for function in functions:
            for step, peak in run(function, name, path, steps).items():
                print(
                    f"| {name} | {step} | {size:,} {unit} | {peak.total / 1e6:,.0f} "
                    f"| {peak.own / 1e6:,.0f} |",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, nargs="*", default=[20_000])
    parser.add_argument("--text-gb", type=float, nargs="*", default=[0.02])
    parser.add_argument("--tokens-gb", type=float, nargs="*", default=[0.1])
    parser.add_argument("--full", action="store_true", help=f"the sizes {FULL}")
    parser.add_argument("--steps", type=int, default=4, help="batches of 256 to read")
    arguments = parser.parse_args()
    if arguments.full:
        vars(arguments).update(FULL)
    os.environ.setdefault("SSLRUN_WORKERS", "2")
    print("| set | step | size | peak, MB | not mapped, MB |")
    print("|---|---|---|---|---|", flush=True)
    for count in arguments.images:
        for name, write in IMAGES.items():
            report(write, [measure_images], name, count, "images", arguments.steps)
    pretraining = [partial(measure_pretraining, *item) for item in PRETEXTS.items()]
    texts = (
        ("tokens", arguments.tokens_gb, write_tokens, pretraining),
        ("text", arguments.text_gb, write_texts, [measure_training, measure_tokenizing]),
    )
    for name, sizes, write, functions in texts:
        for gigabytes in sizes:
            megabytes = round(gigabytes * 1000)
            report(write, functions, name, megabytes, "MB", arguments.steps)


IMAGES = {
    "folder": write_folder,
    "shards": write_shards,
    "parquet": write_parquet,
    "csv-images": write_list,
}
"""Kind of set of images -> the function that writes it."""


if __name__ == "__main__":
    main()
