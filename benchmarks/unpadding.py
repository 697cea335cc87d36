"""Measure what it would save to compute linear maps and norms on real tokens alone (unpadding).

OMP_NUM_THREADS=1 python benchmarks/unpadding.py

MosaicBERT (Portes et al. 2023, arXiv:2312.17482) and ModernBERT (arXiv:2412.13663) remove the
padding of a batch before the first block. sslrun does not; it batches similar lengths and packs
running text. Here, BERT's blocks are replaced by ones that gather the real tokens, and put padding
back for attention alone. The loss and its gradients are the same, which is checked first.

A small BERT learns two sets of the small world, in a random order and in batches of similar
lengths. For each batch both ways compute the loss and its gradients. For each order it prints the
padding, and the median ratio of CPU seconds, padded to unpadded.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import islice
from types import MethodType
from typing import Any

import torch
from lengths import load
from torch import Tensor

from sslrun.backbones.attention import attend
from sslrun.backbones.transformer import Attention, Block, Stack
from sslrun.data.examples import Batch
from sslrun.training import order
from sslrun.training.learner import Learner
from sslrun.training.schedule import Schedule


def attend_to_real(attn: Attention, x: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """Self-attention of real tokens (R, D), which are at `index` (R,) of the padded ones.

    `mask` is (B, 1, 1, T).
    """
    batch, length = mask.shape[0], mask.shape[-1]
    padded = x.new_zeros(batch * length, 3 * x.shape[-1]).index_copy(0, index, attn.qkv(x))
    q, k, v = (
        part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for part in padded.unflatten(0, (batch, length)).chunk(3, dim=-1)
    )
    mixed = attend(q, k, v, mask, dropout=attn.dropout if attn.training else 0.0)
    return attn.proj(mixed.transpose(1, 2).flatten(2).flatten(0, 1)[index])


def unpadded_states(
    stack: Stack, x: Tensor, masks: Any = None, causal: bool = False
) -> list[Tensor]:
    """`Stack.states` of BERT's blocks, with the last state alone."""
    mask = masks[0]
    if mask is None:  # no padding
        return Stack.states(stack, x, masks, causal)
    index = mask.flatten().nonzero()[:, 0]
    real = x.flatten(0, 1)[index]
    for block in stack:
        assert isinstance(block, Block)
        mixed = attend_to_real(block.attn, real, index, mask)
        real = block.norm1(real + block.dropout(mixed))
        real = block.norm2(real + block.dropout(block.mlp(real)))
    return [torch.zeros_like(x).flatten(0, 1).index_copy(0, index, real).view_as(x)]


def unpad(learner: Learner) -> Learner:
    """Let the blocks of a learner's backbone compute without padding."""
    for stack in learner.modules():
        if isinstance(stack, Stack):
            stack.states = MethodType(unpadded_states, stack)  # type: ignore[method-assign]
    return learner


def step(learner: Learner, batch: Batch) -> tuple[float, Tensor]:
    """Compute a loss and its gradients; return the CPU seconds and the loss."""
    learner.zero_grad()
    views = learner.views(batch, torch.Generator().manual_seed(0))
    begin = time.process_time()
    loss = learner(views).loss
    loss.backward()
    return time.process_time() - begin, loss.detach()


def check(padded: Learner, unpadded: Learner, batch: Batch) -> None:
    """Check that both ways give the same loss and gradients, without dropout."""
    losses = [step(learner.eval(), batch)[1] for learner in (padded, unpadded)]
    torch.testing.assert_close(*losses)
    for one, other in zip(padded.parameters(), unpadded.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)
    padded.train(), unpadded.train()


def compare(name: str, args: argparse.Namespace) -> None:
    """Compute the first batches of each order both ways, and print a row for each order."""
    examples, padded = load(name, args.examples, args.model)
    unpadded = unpad(load(name, args.examples, args.model)[1])
    unpadded.load_state_dict(padded.state_dict())
    lengths = examples.lengths
    assert lengths is not None
    for by_length in (False, True):
        schedule = Schedule(epochs=1, batch=args.batch, by_length=by_length)
        chosen = list(islice(order.indices(examples, schedule, 0, 0, None), args.steps))
        batches = list(examples.batches(chosen, torch.device("cpu")))
        check(padded, unpadded, batches[0])
        ratios = [step(padded, batch)[0] / step(unpadded, batch)[0] for batch in batches]
        found = lengths[torch.stack(chosen)]
        padding = 1 - (found.sum() / (found.amax(dim=1).sum() * args.batch)).item()
        words = "similar lengths" if by_length else "random"
        print(f"| {name} | {words} | {padding:.0%} | {statistics.median(ratios):.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bert-mini")
    parser.add_argument("--examples", type=int, default=800, help="examples of each set")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12, help="timed batches of each order")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| set | order | padding | speed of unpadding |")
    print("|---|---|---:|---:|")
    for name in ("world-paraphrase", "world"):
        compare(name, args)
    print(f"{time.process_time():.0f} s of CPU time")


if __name__ == "__main__":
    main()
