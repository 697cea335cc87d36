"""Two processes compute the same losses and gradients as one."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from sslrun import distributed
from sslrun.data.examples import TensorExamples
from sslrun.data.specs import ImageSpec
from sslrun.pretexts.simclr import nt_xent
from sslrun.pretexts.vicreg import vicreg_terms
from sslrun.training import loop
from sslrun.training.device import compute
from sslrun.training.learner import Learner, Output


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


def test_losses_and_gradients_over_two_ranks_are_those_of_the_whole_batch(tmp_path):
    mp.spawn(one_of_two, (str(tmp_path / "store"), str(tmp_path / "found")), nprocs=2)
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


def test_accumulated_gradients_are_reduced_over_ranks_once(tmp_path):
    mp.spawn(trained_by_two, (str(tmp_path / "store"), str(tmp_path / "found")), nprocs=2)
    weight, counts = torch.load(tmp_path / "found", weights_only=True)
    torch.testing.assert_close(weight, trained()[0])
    assert counts.diff().tolist() == [1, 1]  # after the first step, in which DDP learns the graph
