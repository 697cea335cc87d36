"""Measure the memory that large data sets take, on synthetic data of any size.

python benchmarks/memory.py
python benchmarks/memory.py --images 1300000 --text-gb 10

Images are streamed: a folder of files, and tar shards (both are hard links to a few files, so that
they take little space on the disk). Texts are .txt files of words with Zipf's law, on which a
tokenizer is trained. Each row is a step in a process of its own:

- index: list the images, and find their labels;
- read: some batches of an epoch in random order, decoded by two worker processes;
- train: train a tokenizer, which counts every different word;
- tokenize: write the tokens of all texts;
- pairs and pack: make the sequences of BERT, and of packed text, and read some batches.

Columns are the peak of all memory of the process and its workers (Pss: shared pages count once),
the peak of the part that is not mapped from files (the system can drop mapped pages at any time),
how much this part grows per image or per megabyte of text, compared with a quarter of the set, and
what 1.3 million images (ImageNet-1k) or 10 GB of text need if it goes on growing like this.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SIDE = 224
BATCH = 256
CLASSES = 1000
LINKS = 50_000
"""Hard links to one file; file systems allow about 65,000."""
SHARD = 10_000
"""Images in a shard."""
FILE_MB = 100
"""Megabytes in a file of text."""
FULL = {"image": 1_300_000, "MB": 10_000}
"""Unit of a data set -> the number of them to extrapolate to."""
LIMITS = {"train": 1_074}
"""Step -> the largest number that it uses; tokenizers are trained on 2^30 characters at most."""


# ---------------------------------------------------------------- synthetic data


def encode(seed: int) -> bytes:
    """Return a JPEG file of 10 to 20 kB."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((320, 240)).save(file, "jpeg")
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

    images.MAX_TENSOR_BYTES = 0  # stream sets of any size
    step.send("index")
    cls = sources[name]
    key = "train" if name == "shards" else "path"
    examples = cls(cls.Options(size=SIDE, **{key: path})).load("train")
    assert examples.labels is not None
    step.send("read")
    read_batches(examples, steps)


def open_text(name: str, path: str) -> Any:
    """Return the set with its tokenizer, which is trained if the cache has none."""
    from sslrun.data.source import sources

    cls = sources[name]
    source = cls(cls.Options(path=path, length=128, tokenizer={"vocab": 2000}))
    assert source.spec.vocabulary
    return source


def measure_training(name: str, path: str, steps: int, step: Connection) -> None:
    import sslrun.data  # noqa: F401

    step.send("train")
    open_text(name, path)


def measure_text(name: str, path: str, steps: int, step: Connection) -> None:
    import sslrun.data  # noqa: F401

    source = open_text(name, path)
    step.send("tokenize")
    examples = source.load("train")
    step.send("pack")
    read_batches(examples.pack(), steps)
    step.send("pairs")
    read_batches(examples.build_pairs(1, 0), steps)


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
        now, before = measure(process.pid or 0), peaks.get(step, Peak())
        peaks[step] = Peak(max(before.total, now.total), max(before.own, now.own))
        try:
            if here.poll(0.1):
                step = here.recv()
        except EOFError:
            break
    process.join()
    if process.exitcode:
        raise SystemExit(f"{name}: failed")
    return peaks


def compare(
    write: Any, functions: Sequence[Any], name: str, count: int, unit: str, steps: int
) -> None:
    """Measure a quarter of a set and the whole, and print a row for each step.

    The functions run in this order, each in a process of its own, with one cache.
    """
    sizes = [max(1, count // 4), count]
    runs = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["SSLRUN_CACHE"] = f"{folder}/cache"
            path = write(Path(folder) / "data", size)
            peaks: dict[str, Peak] = {}
            for function in functions:
                peaks |= run(function, name, path, steps)
            runs.append(peaks)
    for step, peak in runs[1].items():
        growth = (peak.own - runs[0][step].own) / (sizes[1] - sizes[0])
        full = peak.own + max(0.0, growth) * (min(FULL[unit], LIMITS.get(step, FULL[unit])) - count)
        print(
            f"| {name} | {step} | {peak.total / 1e6:,.0f} | {peak.own / 1e6:,.0f} "
            f"| {growth:,.0f} per {unit} | {full / 1e9:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--text-gb", type=float, default=0.02)
    parser.add_argument("--steps", type=int, default=4, help="batches of 256 to read")
    arguments = parser.parse_args()
    os.environ.setdefault("SSLRUN_WORKERS", "2")
    images, megabytes = arguments.images, round(arguments.text_gb * 1000)
    print("| set | step | peak, MB | not mapped, MB | growth, bytes | full size, GB |")
    print("|---|---|---|---|---|---|")
    if images:
        compare(write_folder, [measure_images], "folder", images, "image", arguments.steps)
        compare(write_shards, [measure_images], "shards", images, "image", arguments.steps)
    if megabytes:
        compare(
            write_texts, [measure_training, measure_text], "text", megabytes, "MB", arguments.steps
        )


if __name__ == "__main__":
    main()
