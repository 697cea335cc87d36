"""The errands of docs/design.md: one file outside the package is enough for each."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sslrun.backbones import build_backbone, load_backbone

ROOT = Path(__file__).parents[2]

CLIPS = '''
"""Clips of moving squares, a pretext task on frame order, and a task to classify clips."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from sslrun.data.examples import Batch, TensorExamples
from sslrun.data.source import Source, sources
from sslrun.data.specs import ImageSpec, VideoSpec
from sslrun.metric import Metric
from sslrun.pretexts.base import Pretext, pretexts
from sslrun.registry import Options
from sslrun.tasks.base import Task, TaskOptions, tasks
from sslrun.training.learner import Output


@sources.register("moving-squares")
class MovingSquares(Source):
    """Squares that move right or down."""

    gives = VideoSpec
    task = "direction"
    splits = ("train",)

    def load(self, split):
        labels = torch.arange(160) % 2
        places = torch.randint(0, 6, (160, 2), generator=torch.Generator().manual_seed(0))
        clips = torch.zeros(160, 4, 3, 12, 12, dtype=torch.uint8)
        for clip, (row, column), label in zip(clips, places.tolist(), labels.tolist()):
            for frame in range(4):
                top, left = (row, column + frame) if label == 0 else (row + frame, column)
                clip[frame, :, top : top + 3, left : left + 3] = 255
        return TensorExamples(clips, labels, ("right", "down"), VideoSpec(12, 4))

    def sketch(self, count):
        return VideoSpec(12, 4), Batch(torch.zeros(count, 4, 3, 12, 12, dtype=torch.uint8), None)


@pretexts.register("frame-order")
class FrameOrder(Pretext):
    """Tell whether two frames are in their order (Misra et al., ECCV 2016)."""

    reads, gives = VideoSpec, ImageSpec

    @classmethod
    def backbone_spec(cls, options, spec):
        return spec.frame

    def __init__(self, options, backbone):
        super().__init__(options, backbone)
        self.head = nn.Linear(2 * backbone.width, 2)

    def views(self, batch, generator):
        clips = batch.inputs.float() / 255
        swapped = torch.randint(0, 2, (len(clips),), generator=generator)
        first, last = clips[:, 0], clips[:, -1]
        swap = swapped.bool()[:, None, None, None]
        return torch.cat([torch.where(swap, last, first), torch.where(swap, first, last)]), swapped

    def forward(self, views):
        frames, swapped = views
        pairs = torch.cat(self.backbone(frames).pooled.chunk(2), dim=1)
        return Output(F.cross_entropy(self.head(pairs), swapped))


@tasks.register("direction")
class Direction(Task):
    """Predict the class of a clip from the concatenated features of its frames."""

    reads, gives = VideoSpec, ImageSpec
    metrics = (Metric("accuracy"),)

    @property
    def backbone_spec(self):
        return self.spec.frame

    def head(self, width, depth=0):
        return nn.Linear(self.spec.frames * width, len(self.classes))

    def inputs(self, batch):
        return batch.inputs.flatten(0, 1).float() / 255

    def readout(self, features):
        return features.pooled.unflatten(0, (-1, self.spec.frames)).flatten(1)

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets)

    def measure(self, outputs, targets):
        return {"accuracy": 100 * (outputs.argmax(1) == targets).float().mean().item()}
'''

GRAPHS = '''
"""Random graphs, a backbone for them, and a task that is better when its error is lower."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from sslrun.backbones.base import Backbone, Features, backbones
from sslrun.data.examples import Batch, Examples
from sslrun.data.source import Source, sources
from sslrun.data.specs import InputSpec
from sslrun.metric import Metric
from sslrun.tasks.base import Task, TaskOptions, tasks


@dataclass(frozen=True)
class AdjacencySpec(InputSpec):
    kind = "adjacency"
    unit = "graphs"
    largest: int


class Graphs(NamedTuple):
    adjacency: torch.Tensor

    def to(self, device):
        return Graphs(self.adjacency.to(device))

    def numel(self):
        return self.adjacency.numel()


@dataclass(frozen=True)
class GraphExamples(Examples):
    adjacency: torch.Tensor
    labels: torch.Tensor
    classes: tuple = ()
    spec: Any = AdjacencySpec(8)

    @property
    def strata(self):
        return torch.zeros(len(self), dtype=torch.int64)

    def __len__(self):
        return len(self.adjacency)

    def subset(self, indices):
        return replace(self, adjacency=self.adjacency[indices], labels=self.labels[indices])

    def batches(self, indices, device):
        for chosen in indices:
            yield Batch(Graphs(self.adjacency[chosen]), self.labels[chosen]).to(device)


@sources.register("random-graphs")
class RandomGraphs(Source):
    """Random graphs of 8 nodes with their numbers of triangles."""

    gives = AdjacencySpec
    task = "number"
    splits = ("train",)

    def load(self, split):
        generator = torch.Generator().manual_seed(0)
        upper = (torch.rand(200, 8, 8, generator=generator) < 0.4).float().triu(1)
        adjacency = upper + upper.transpose(1, 2)
        triangles = (adjacency @ adjacency @ adjacency).diagonal(dim1=1, dim2=2).sum(1) / 6
        return GraphExamples(adjacency, triangles)

    def sketch(self, count):
        return AdjacencySpec(8), Batch(Graphs(torch.zeros(count, 8, 8)), None)


@backbones.register("message-passing")
class MessagePassing(Backbone):
    """Two rounds of sums over neighbors."""

    takes = AdjacencySpec

    def __init__(self, options, spec):
        super().__init__(options, spec)
        self.width = 16
        self.maps = nn.ModuleList([nn.Linear(1, 16), nn.Linear(16, 16)])

    def forward(self, inputs):
        x = inputs.adjacency.sum(dim=2, keepdim=True)
        for step in self.maps:
            x = step(inputs.adjacency @ x).relu()
        return Features(x.mean(dim=1), tokens=x)


class NumberOptions(TaskOptions):
    @property
    def linear(self):
        return False


@tasks.register("number")
class Number(Task):
    """Predict one number per graph."""

    Options = NumberOptions
    reads = AdjacencySpec
    metrics = (Metric("mae", unit="triangles", better="lower", digits=2),)

    def head(self, width, depth=0):
        return nn.Linear(width, 1)

    def loss(self, outputs, targets):
        return F.mse_loss(outputs[:, 0], targets)

    def measure(self, outputs, targets):
        return {"mae": (outputs[:, 0] - targets).abs().mean().item()}
'''

TEACHER = '''
"""A pretext task that keeps its teacher, and data that are visited in an order of their own."""

import copy

import torch

from sslrun.data.examples import TensorExamples
from sslrun.data.image.sources import Digits
from sslrun.data.source import sources
from sslrun.data.specs import ImageSpec
from sslrun.pretexts.base import Pretext, pretexts
from sslrun.pretexts.views import follow
from sslrun.training.learner import Output


@pretexts.register("self-distillation")
class SelfDistillation(Pretext):
    """Match a copy of the backbone that never moves, and keep that copy."""

    reads = ImageSpec

    def __init__(self, options, backbone):
        super().__init__(options, backbone)
        self.teacher = copy.deepcopy(backbone).requires_grad_(False)
        self.register_buffer("momentum", torch.zeros(()))

    @property
    def kept(self):
        return self.teacher

    def views(self, batch, generator):
        images = batch.inputs.float() / 255
        return images, images + 0.1 * torch.randn(images.shape, generator=generator)

    def forward(self, views):
        difference = self.backbone(views[1]).pooled - self.teacher(views[0]).pooled
        return Output(difference.square().mean())

    def before_step(self, progress):
        self.momentum.fill_(1)

    def after_step(self, progress):
        follow(self.teacher, self.backbone, self.momentum.item())


class EasyFirst(TensorExamples):
    def order(self, seed, epoch):
        """Visit the darkest images first."""
        with open("orders.txt", "a") as file:
            file.write(f"{epoch}\\n")
        return self.inputs.float().mean(dim=(1, 2, 3)).argsort()


@sources.register("easy-digits")
class EasyDigits(Digits):
    """Digits, easy ones first."""

    def load(self, split):
        digits = super().load(split)
        return EasyFirst(digits.inputs, digits.labels, digits.classes, digits.spec)
'''

SCHEDULE = {"steps": 4, "batch": 16, "lr": 0.01, "precision": "fp32"}
SMALL = {"name": "resnet18", "stem": "small", "channels": 4}


def write(folder, name, plugin, **recipe):
    (folder / "mine.py").write_text(plugin)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, **recipe}))


def test_a_pretext_task_on_clips_serves_image_backbones(outside, result, tmp_path, start_sslrun):
    write(
        tmp_path,
        "video",
        CLIPS,
        backbone=SMALL,
        pretext="frame-order",
        data="moving-squares",
        pretrain=SCHEDULE,
        evaluate={"moving-squares": {"protocols": ["knn", "probe", "finetune"]}},
        finetune=SCHEDULE,
    )
    assert "valid" in outside("check", "video.yaml", "--import", "mine.py")
    outside("sweep", "video.yaml", "--import", "mine.py")
    pretrained, folder = result("pretrain")
    assert "knn" in pretrained["watched"]
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["grad_norm"] > 0
    assert first["memory"] > 0
    assert 0 <= first["data_wait"] <= 1
    network = load_backbone(folder)
    assert (network.name, network.spec.kind, network.spec.size) == ("resnet18", "image", 12)
    assert (
        load_backbone(result("finetune")[1]).spec == network.spec
    )  # its own, not that of the clips
    assert all(
        0 <= result(stage)[0]["metrics"]["test"]["accuracy"] <= 100
        for stage in ("knn", "probe", "finetune")
    )
    refused = outside("check", "video.yaml", "backbone=bert-tiny", "--import", "mine.py", code=2)
    assert "'bert-tiny' takes text data, but 'frame-order' gives image data" in refused
    refused = outside("check", "video.yaml", "pretext=simclr", "--import", "mine.py", code=2)
    assert "'simclr' reads image data, but 'moving-squares' is video data" in refused
    # A recipe imports nothing: a process without --import does not know the data.
    alone = start_sslrun("check", "video.yaml", cwd=tmp_path).finish()
    assert "no such data set: 'moving-squares'" in alone.stderr


def test_a_graph_task_is_better_when_its_error_is_lower(outside, result, tmp_path):
    write(
        tmp_path, "graphs", GRAPHS, backbone="message-passing", data="random-graphs",
        evaluate={"random-graphs": {"protocols": ["probe", "finetune"]}},
        probe={"solver": "sgd", "sgd": SCHEDULE},
        finetune={**SCHEDULE, "steps": 60, "lr": [1e-9, 0.03], "optimizer": "adamw", "batch": 64},
    )  # fmt: skip
    printed = outside("sweep", "graphs.yaml", "--import", "mine.py")
    assert "test mae in triangles (lower is better)" in printed
    assert "100 % ↓" in printed
    tuned, _ = result("finetune")
    assert tuned["metric"] == {"name": "mae", "unit": "triangles", "better": "lower", "digits": 2}
    tried = {float(rate): value for rate, value in tuned["tried"].items()}
    assert tuned["lr"] == min(tried, key=tried.get) == 0.03
    outside("table", "graphs.yaml", "--import", "mine.py", "-o", "table.md")
    lines = (tmp_path / "table.md").read_text().splitlines()
    (bold,) = [line for line in lines if "**" in line and line.startswith("|")]
    assert "finetune" in bold  # the lowest error is the best


def test_a_pretext_task_keeps_its_teacher_and_data_their_order(outside, result, tmp_path):
    write(
        tmp_path,
        "teacher",
        TEACHER,
        backbone=SMALL,
        pretext="self-distillation",
        data={"name": "easy-digits", "size": 8},
        pretrain={**SCHEDULE, "steps": None, "epochs": 2, "batch": 512},
        evaluate={"easy-digits": {"protocols": ["knn"]}},
    )
    outside("sweep", "teacher.yaml", "--import", "mine.py")
    assert (tmp_path / "orders.txt").read_text().split() == ["0", "1"]
    _, folder = result("pretrain")
    losses = [
        json.loads(line)["loss"]
        for line in (folder / "metrics.jsonl").read_text().splitlines()
        if "loss" in line
    ]
    assert losses[-1] > 0  # the loss is positive, so the student has moved
    kept = load_backbone(folder)
    torch.manual_seed(0)
    initial = build_backbone("resnet18", kept.options, kept.spec)
    saved = load_file(folder / "backbone.safetensors")
    for name, parameter in initial.named_parameters():
        assert torch.equal(saved[name], parameter), name  # the teacher is unchanged
    assert saved.keys() == initial.state_dict().keys()


def test_a_table_format_is_one_function(outside, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from sslrun.results.formats import table_formats\n\n\n"
        '@table_formats.register(".tsv")\n'
        "def to_tsv(table):\n"
        "    lines = []\n"
        "    for (row, column), cell in table.cells.items():\n"
        '        lines.append(f"{row.name}\\t{column.task}\\t{cell.mean}")\n'
        '    return "\\n".join(lines)\n'
    )
    recipe = {"name": "tsv", "backbone": "pixels", "data": {"name": "digits", "size": 8}}
    (tmp_path / "tsv.yaml").write_text(
        yaml.safe_dump({**recipe, "evaluate": {"digits": {"protocols": ["knn"]}}})
    )
    outside("sweep", "tsv.yaml")
    outside("table", "tsv.yaml", "-o", "table.tsv", "--import", "mine.py")
    name, task, mean = (tmp_path / "table.tsv").read_text().split("\t")
    assert (name, task) == ("tsv", "digits")
    assert 90 < float(mean) < 100


@pytest.mark.parametrize("name", ["inpaint", "ordinal", "label_propagation", "convnet"])
def test_the_examples_of_the_documentation_run(name, outside, tmp_path):
    source, recipe = (ROOT / "docs/examples" / f"{name}{ending}" for ending in (".py", ".yaml"))
    assert len(source.read_text().splitlines()) <= 60
    fewer = [
        "--set",
        "pretrain={epochs: null, steps: 2, batch: 32}",
        "--set",
        "finetune={steps: 2, batch: 32}",
        "--set",
        "watch={every: 1000, examples: 64}",
    ]
    printed = outside("sweep", recipe, "--import", source, *fewer)
    assert "digits" in printed
    assert list(tmp_path.glob("runs/*/*/result.json"))


def test_the_example_of_the_readme_runs(outside, result, tmp_path):
    readme = (ROOT / "README.md").read_text()
    (code,) = [block.partition("```")[0] for block in readme.split("```python\n")[1:]]
    write(
        tmp_path,
        "mine",
        code,
        backbone=SMALL,
        pretext="brightness",
        data="digits",
        pretrain=SCHEDULE,
    )
    outside("pretrain", "mine.yaml", "--import", "mine.py")
    assert result("pretrain")[0]["pretext"] == "brightness"
