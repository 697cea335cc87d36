"""Two processes with sharded parameters (FSDP) train as one process does, and resume as one."""

from itertools import islice

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from sslrun.backbones import build_backbone
from sslrun.backbones.transformer import checkpoint_activations
from sslrun.data.examples import TensorExamples
from sslrun.data.specs import ImageSpec
from sslrun.pretexts.base import pretexts
from sslrun.training.checkpoint import latest, restore, save
from sslrun.training.device import compute
from sslrun.training.learner import Learner, Output
from sslrun.training.loop import Schedule, Training, train

CPU = compute("cpu")
STILL = {"augmentation": {}, "second": None}
"""Views that are the images themselves, as devices draw different ones."""
VIT = ("vit-tiny", {"patch": 4, "depth": 2, "width": 16, "heads": 2, "pool": "mean"})
RESNET = ("resnet18", {"channels": 16, "stem": "small"})


def images(count=32):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (count, 3, 8, 8), generator=generator).byte()
    return TensorExamples(inputs, torch.zeros(count, dtype=torch.int64), ("a",), ImageSpec(8))


class Tokens(Learner):
    """Masked language modeling without random masks: BERT's blocks and its tied embedding."""

    def __init__(self):
        super().__init__()
        from sslrun.backbones.transformer import BERT_STYLE, Block, Stack, initialize

        self.embed = nn.Embedding(32, 16)
        self.stack = Stack(Block(16, 2, BERT_STYLE) for _ in range(2))
        self.unused = nn.Linear(16, 16)  # like BERT's pooler
        initialize(self)

    def blocks(self):
        return list(self.stack)

    def views(self, batch, generator):
        return batch.inputs.flatten(1).long() % 32

    def forward(self, ids):
        hidden = self.stack(self.embed(ids.where(ids % 7 > 0, 0)))
        logits = hidden @ self.embed.weight.T
        return Output(nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()))


def build(name, backbone, **options):
    torch.manual_seed(0)
    if name == "mlm":
        return Tokens()
    named = build_backbone(*backbone, ImageSpec(8))
    return pretexts[name](pretexts[name].Options(**options), named)


CASES = {
    "simclr": (("simclr", VIT), {**STILL, "width": 16}, {"clip": 0.05}),
    "byol-lars": (
        ("byol", RESNET),
        {**STILL, "hidden": 16, "projection": 8},
        {"optimizer": "lars", "lr": 0.2, "ema": 0.5, "weight_decay": 1e-3},
    ),
    "mlm": (("mlm", None), {}, {"accumulate": 2, "clip_each": 0.1}),
    "mlm-muon": (("mlm", None), {}, {"optimizer": "muon"}),
    "mlm-sgd": (("mlm", None), {}, {"optimizer": "sgd", "lr": 0.5}),
}


def training_of(case, sharded=True):
    (name, backbone), options, changes = CASES[case]
    if name == "simclr":
        options.pop("width", None)
    schedule = Schedule(**{"steps": 4, "batch": 16, "lr": 0.01, "precision": "fp32", **changes})
    return Training(build(name, backbone, **options), schedule, CPU, sharded)


def finish(training):
    """Train to the end; return the losses, the gradient norms and the final weights."""
    steps = [(float(step.loss), float(step.grad_norm)) for step in train(training, images(), 0)]
    learner = training.averaged
    weights = torch.cat([weight.flatten() for weight in learner.state_dict().values()])
    return torch.tensor(steps), weights


def sharded_by_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    outcomes = {}
    for case in CASES:
        training = training_of(case)
        for step in islice(train(training, images(), 0), 2):
            assert not step.last
        save(training, folder / case)
        resumed = training_of(case)
        restore(resumed, latest(folder / case))
        outcomes[case] = finish(resumed)
        assert isinstance(resumed.averaged, type(build(*CASES[case][0], **CASES[case][1])))
    if rank == 0:
        torch.save(outcomes, folder / "found")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes left their outcomes and checkpoints of two steps."""
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(sharded_by_two, (folder,), nprocs=2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_sharded_training_equals_that_of_one_process(two, case):
    """Losses within 1e-4 relative, weights within 2e-4, from a resume after two of four steps."""
    found = torch.load(two / "found", weights_only=True)[case]
    steps, weights = finish(training_of(case, sharded=False))
    torch.testing.assert_close(found[0], steps[2:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], weights, rtol=1e-4, atol=2e-4)
    begun_by_two = training_of(case)
    restore(begun_by_two, latest(two / case))
    assert begun_by_two.step == 2
    torch.testing.assert_close(finish(begun_by_two)[0], steps[2:], rtol=1e-4, atol=1e-5)
