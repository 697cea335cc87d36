"""Two processes with sharded parameters (FSDP) train as one process does, and resume as one."""

import shutil
from itertools import islice

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sslrun import distributed
from sslrun.backbones import build_backbone
from sslrun.backbones.transformer import (
    BERT_STYLE,
    Block,
    Stack,
    checkpoint_activations,
    initialize,
)
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


def images(count=32):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (count, 3, 8, 8), generator=generator).byte()
    return TensorExamples(inputs, torch.zeros(count, dtype=torch.int64), ("a",), ImageSpec(8))


class Tokens(Learner):
    """Masked language modeling without random masks: BERT's blocks and its tied embedding."""

    def __init__(self):
        super().__init__()
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


def build(name, **options):
    torch.manual_seed(0)
    if name.startswith("mlm"):
        return Tokens()
    vit = {"patch": 4, "depth": 2, "width": 16, "heads": 2, "pool": "mean"}
    return pretexts[name](
        pretexts[name].Options(**options), build_backbone("vit-tiny", vit, ImageSpec(8))
    )


CASES = {
    "byol": (
        {**STILL, "hidden": 16, "projection": 8},
        {"optimizer": "lars", "lr": 0.2, "ema": 0.5, "weight_decay": 1e-3, "clip": 0.05},
    ),
    "mlm": ({}, {"accumulate": 2, "clip_each": 0.1}),
    "mlm muon": ({}, {"optimizer": "muon"}),
    "mlm sgd": ({}, {"optimizer": "sgd", "lr": 0.5}),
}
"""Options of the learner, and of the schedule. BYOL has a teacher, and whole norms in its LARS."""


def training_of(case, sharded=True):
    options, changes = CASES[case]
    schedule = Schedule(**{"steps": 4, "batch": 16, "lr": 0.01, "precision": "fp32", **changes})
    learner = build(case, **options)
    if sharded:
        assert checkpoint_activations(learner)
    return Training(learner, schedule, CPU, sharded)


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
    assert distributed.decide(rank + 0.5) == 0.5
    if rank == 0:
        torch.save(outcomes, folder / "found")
    dist.destroy_process_group()
    distributed._processors.cache_clear()


@pytest.fixture(scope="module")
def two(run_two, tmp_path_factory):
    """The folder in which two processes left their outcomes and checkpoints of two steps."""
    folder = tmp_path_factory.mktemp("two")
    run_two(sharded_by_two, (folder,))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_sharded_training_equals_that_of_one_process(two, case):
    """Losses within 1e-4 and weights within 1e-3, relative, after a resume in the middle."""
    found = torch.load(two / "found", weights_only=True)[case]
    steps, weights = finish(training_of(case, sharded=False))
    torch.testing.assert_close(found[0], steps[2:], rtol=1e-4, atol=1e-5)
    assert (found[1] - weights).norm() < 1e-3 * weights.norm()
    begun_by_two = training_of(case)
    restore(begun_by_two, latest(two / case))
    assert begun_by_two.step == 2
    torch.testing.assert_close(finish(begun_by_two)[0], steps[2:], rtol=1e-4, atol=1e-5)


def test_parts_of_two_processes_are_checked_and_hold_no_pickles(two):
    checkpoint = latest(two / "mlm")
    parts = sorted(path.name for path in checkpoint.iterdir())
    assert [name.partition("-model")[0] for name in parts] == [
        "manifest.json", "shard-00001", "shard-00002", "training.pt",
    ]  # fmt: skip
    damaged = two / "damaged" / checkpoint.name
    shutil.copytree(checkpoint, damaged)
    content = bytearray((damaged / parts[2]).read_bytes())
    content[-1] ^= 1
    (damaged / parts[2]).write_bytes(content)
    with pytest.warns(UserWarning, match="damaged"):
        assert latest(damaged.parent) is None


def test_recomputed_blocks_keep_less_and_give_the_same_gradients():
    """Dropout is drawn again as before; most of what is kept for gradients is no longer kept."""
    kept, gradients = {}, {}
    for recomputes in (False, True):
        torch.manual_seed(0)
        stack = Stack(Block(16, 2, dropout=0.5, drop_path=0.3) for _ in range(4))
        if recomputes:
            assert checkpoint_activations(stack)
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        torch.manual_seed(1)
        inputs = torch.randn(8, 10, 16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = stack(inputs)
        kept[recomputes] = sum(sizes)
        outputs.square().sum().backward()
        gradients[recomputes] = [inputs.grad, *(weight.grad for weight in stack.parameters())]
    assert kept[True] < kept[False] / 4
    assert all(map(torch.equal, gradients[True], gradients[False]))
    assert not checkpoint_activations(nn.Linear(2, 2))
