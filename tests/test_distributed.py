"""Two processes compute the same losses and gradients as one."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sslrun import distributed
from sslrun.backbones import build_backbone
from sslrun.data.examples import Batch, TensorExamples
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.moco import info_nce
from sslrun.pretexts.simclr import nt_xent
from sslrun.pretexts.vicreg import vicreg_terms
from sslrun.training import loop
from sslrun.training.device import compute
from sslrun.training.learner import Learner, Output
from sslrun.training.norm import SyncedBatchNorm, synchronize_norms


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 8, 6, generator=generator), torch.randn(6, 4, generator=generator)


def losses(first, second, weight):
    contrastive, _ = nt_xent(first @ weight, second @ weight, 0.5)
    return contrastive + sum(vicreg_terms(first @ weight, second @ weight))


def one_of_two(rank, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    views, weight = inputs()
    weight.requires_grad_()
    first, second = views[:, rank * 4 : rank * 4 + 4]
    loss = losses(first, second, weight)
    loss.backward()
    # Average, as data-parallel training does with gradients.
    mean, gradient = loss.detach() / 2, weight.grad / 2
    dist.all_reduce(mean)
    dist.all_reduce(gradient)
    if distributed.is_main():
        torch.save([mean, gradient], results)
    dist.destroy_process_group()


def test_losses_and_gradients_over_two_ranks_are_those_of_the_whole_batch(run_two, tmp_path):
    run_two(one_of_two, (str(tmp_path / "store"), str(tmp_path / "found")))
    loss, gradient = torch.load(tmp_path / "found", weights_only=True)
    views, weight = inputs()
    weight.requires_grad_()
    whole = losses(*views, weight)
    whole.backward()
    torch.testing.assert_close(loss, whole.detach())
    torch.testing.assert_close(gradient, weight.grad)


class Linear(Learner):
    """The smallest learner; its loss depends only on the batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(48, 4)

    def views(self, batch, generator):
        return batch.inputs.flatten(1) / 255, batch.labels

    def forward(self, views):
        return Output(nn.functional.cross_entropy(self.backbone(views[0]), views[1]))

    def layers(self):
        return [list(self.backbone.parameters())]


def trained(wrapped=None):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 4, 4), dtype=torch.uint8, generator=generator)
    examples = TensorExamples(
        images, torch.randint(0, 4, (64,), generator=generator), tuple("abcd"), ImageSpec(4)
    )
    training = loop.Training(
        Linear(),
        loop.Schedule(steps=3, batch=32, accumulate=4, lr=0.1, precision="fp32"),
        compute("cpu"),
    )
    counts = []
    for _ in loop.train(training, examples, seed=0):
        counts.append(len(wrapped or ()))
    return training.learner.backbone.weight.detach(), counts


def trained_by_two(rank, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    sums, wrap = [], loop._wrap

    def counted(training, total):
        model, compiled = wrap(training, total)

        def hook(_, bucket):
            sums.append(bucket)
            done = dist.all_reduce(bucket.buffer() / 2, async_op=True).get_future()
            return done.then(lambda all_summed: all_summed.value()[0])

        model.register_comm_hook(None, hook)
        return model, compiled

    loop._wrap = counted
    weight, counts = trained(sums)
    if distributed.is_main():
        torch.save([weight, torch.tensor(counts)], results)
    dist.destroy_process_group()


def test_accumulated_gradients_are_reduced_over_ranks_once(run_two, tmp_path):
    run_two(trained_by_two, (str(tmp_path / "store"), str(tmp_path / "found")))
    weight, counts = torch.load(tmp_path / "found", weights_only=True)
    torch.testing.assert_close(weight, trained()[0])
    assert counts.diff().tolist() == [1, 1]  # after the first step, in which DDP learns the graph


SYNCED = {
    "simclr": {},
    "barlow": {"width": 16},
    "vicreg": {"width": 16},
    "simsiam": {"hidden": 16, "bottleneck": 8},
    "byol": {"hidden": 16, "projection": 8},
}
"""The tasks whose authors synchronize batch norm; all have a head with BatchNorm1d."""
STILL = {"augmentation": {}, "second": None}
"""Views that are the images themselves, as devices draw different ones."""


def built(name, **options):
    torch.manual_seed(0)
    backbone = build_backbone("resnet18", {"channels": 8, "stem": "small"}, ImageSpec(16))
    cls = pretexts[name]
    return cls(cls.Options(**{**STILL, **SYNCED.get(name, {}), **options}), backbone)


def image_views(count=16):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, count, 3, 16, 16, generator=generator).unbind()


def outcome(pretext, views):
    """The loss, the gradients, and the buffers after one forward pass, by name."""
    loss = pretext(views).loss
    loss.backward()
    named = pretext.named_parameters()
    gradients = {name: each.grad for name, each in named if each.grad is not None}
    return {"loss": {"loss": loss.detach()}, "gradients": gradients, "buffers": buffers(pretext)}


def buffers(pretext):
    return dict(pretext.named_buffers())


def trained_losses():
    """The losses that the loop reports for SimCLR, and the running statistics that it ends with."""
    images = torch.randint(0, 256, (32, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(32, dtype=torch.int64)
    examples = TensorExamples(images.byte(), labels, ("a",), ImageSpec(16))
    schedule = loop.Schedule(steps=3, batch=16, lr=0.1, optimizer="sgd", precision="fp32")
    training = loop.Training(built("simclr"), schedule, compute("cpu"))
    steps = [(step.loss, step.metrics["accuracy"]) for step in loop.train(training, examples, 0)]
    return {"steps": torch.tensor(steps), **buffers(training.learner)}


def synced_by_two(rank, store, found):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    outcomes = {"loop": trained_losses()}
    for name in SYNCED:
        # In float64: in float32 gradients differ by rounding alone by up to 2e-5.
        pretext = built(name).double()
        synchronize_norms(pretext, torch.device("cpu"))
        halves = tuple(view[rank * 8 : rank * 8 + 8].double() for view in image_views())
        outcomes[name] = outcome(pretext, halves)
        for values in (outcomes[name]["loss"], outcomes[name]["gradients"]):
            for value in values.values():
                dist.all_reduce(value.div_(2))  # as data-parallel training does
    if distributed.is_main():
        torch.save(outcomes, found)
    dist.destroy_process_group()


def test_two_processes_with_synchronized_batch_norm_equal_one(run_two, tmp_path):
    run_two(synced_by_two, (str(tmp_path / "store"), str(tmp_path / "found")))
    found = torch.load(tmp_path / "found", weights_only=True)
    for name in SYNCED:
        whole = tuple(view.double() for view in image_views())
        alone = outcome(built(name).double(), whole)
        torch.testing.assert_close(
            found[name], alone, rtol=1e-5, atol=1e-5, msg=partial("{}: {}".format, name)
        )
    torch.testing.assert_close(found["loop"], trained_losses(), rtol=1e-4, atol=1e-4)


def test_one_process_keeps_plain_batch_norm():
    pretext = built("simclr")
    names = list(pretext.state_dict())
    loop.Training(pretext, loop.Schedule(steps=1, batch=4), compute("cpu"))
    assert not any(isinstance(each, SyncedBatchNorm) for each in pretext.modules())
    synchronize_norms(pretext, torch.device("cpu"))
    plain = built("simclr")
    outcomes = [outcome(each, image_views()) for each in (plain, pretext)]
    torch.testing.assert_close(*outcomes, rtol=0, atol=0)
    assert list(pretext.state_dict()) == names
    assert any(isinstance(each, SyncedBatchNorm) for each in pretext.modules())


def test_a_class_of_batch_norm_that_does_more_is_not_replaced():
    class Activated(nn.BatchNorm2d):
        pass

    with pytest.raises(UserError, match=r"Activated cannot be .*pretext\.sync_norm: false"):
        synchronize_norms(nn.Sequential(Activated(3)), torch.device("cpu"))


def moco_by_two(rank, store, found):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    pretext = built("moco", queue=32, projection=8)
    images = image_views()[0][rank * 8 : rank * 8 + 8]
    generator = torch.Generator().manual_seed(rank)  # as each device has its own
    views = pretext.views(Batch(images, None), generator)
    done = outcome(pretext, views)
    pretext.after_step(0.5)
    results = {**done, "order": views[2], "queue": pretext.queue}
    torch.save(results, f"{found}-{rank}")
    dist.destroy_process_group()


def test_moco_shuffles_keys_over_two_processes(run_two, tmp_path):
    """Against the formula: each device encodes its half of the shuffled keys by itself."""
    run_two(moco_by_two, (str(tmp_path / "store"), str(tmp_path / "found")))
    found = [torch.load(tmp_path / f"found-{rank}", weights_only=True) for rank in range(2)]
    order = found[0]["order"]
    assert torch.equal(order, found[1]["order"])
    assert sorted(order.tolist()) == list(range(16))
    assert set(order[:8].tolist()) != set(range(8))
    images = image_views()[0]
    keys = torch.empty(16, 8)
    for half in order.chunk(2):
        encoder = built("moco", queue=32, projection=8).teacher  # statistics of its own
        keys[half] = nn.functional.normalize(encoder(images[half]), dim=1)
    for rank, half in enumerate(torch.arange(16).chunk(2)):
        pretext = built("moco", queue=32, projection=8)
        queries = nn.functional.normalize(
            pretext.head(pretext.backbone(images[half]).pooled), dim=1
        )
        loss, _ = info_nce(queries, keys[half], pretext.queue, 0.2)
        torch.testing.assert_close(found[rank]["loss"]["loss"], loss.detach())
        loss.backward()
        gradient = pretext.backbone.conv1.weight.grad
        torch.testing.assert_close(found[rank]["gradients"]["backbone.conv1.weight"], gradient)
        torch.testing.assert_close(found[rank]["queue"][:16], keys)
