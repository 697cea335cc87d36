"""Two processes together compute what one computes alone."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sslrun import distributed
from sslrun.pretexts.simclr import nt_xent
from sslrun.pretexts.vicreg import vicreg_terms


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 8, 6, generator=generator), torch.randn(6, 4, generator=generator)


def losses(first, second, weight):
    contrastive, _ = nt_xent(first @ weight, second @ weight, 0.5)
    return contrastive + sum(vicreg_terms(first @ weight, second @ weight))


def one_of_two(rank, store, found):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    views, weight = inputs()
    weight.requires_grad_()
    first, second = views[:, rank * 4 : rank * 4 + 4]
    loss = losses(first, second, weight)
    loss.backward()
    # As data-parallel training does with parameters' gradients.
    mean, gradient = loss.detach() / 2, weight.grad / 2
    dist.all_reduce(mean)
    dist.all_reduce(gradient)
    if distributed.is_main():
        torch.save([mean, gradient], found)
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
