"""Time DINO's multi-crop steps against what their pixels cost, and against lightly's.

python benchmarks/multicrop.py [--steps 2] [--batch 64] [--locals 4]

The forward and backward pass of DINO with local views is compared with that of the two global views
alone, scaled by the tokens that the networks read: those of student and teacher, where a token of
the student counts three times, for its backward pass. The goal is a ratio of at most 1.15. Whole
steps, with augmentation and optimizer, stand beside those of lightly if it is installed. Blocks of
steps alternate, so that drift in the machine's speed affects all of them.

lightly is used as in its DINO example, with DINOTransform on PIL images in a DataLoader with two
workers, on the same ViT, in float32.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import torch
import torchvision
from blocks import time_blocks

from sslrun.backbones import build_backbone
from sslrun.backbones.base import Backbone
from sslrun.data.examples import Batch, TensorExamples
from sslrun.data.specs import ImageSpec
from sslrun.pretexts.base import Pretext, pretexts
from sslrun.training.device import compute
from sslrun.training.loop import Training, train
from sslrun.training.schedule import Schedule

try:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import update_momentum
    from lightly.transforms import DINOTransform
except ImportError:
    HAS_LIGHTLY = False
else:
    HAS_LIGHTLY = True

SIDE, PATCH = 32, 4
LOCAL = 16
HEAD = {"outputs": 2048, "hidden": 512, "bottleneck": 64}


def build_vit(args: argparse.Namespace) -> Backbone:
    shape = {"patch": PATCH, "width": args.width, "depth": args.depth, "heads": 3}
    return build_backbone("vit-tiny", shape, ImageSpec(SIDE))


def build_dino(args: argparse.Namespace, crops: int) -> Pretext:
    """Build DINO with `crops` local views."""
    cls = pretexts["dino"]
    local = {"crops": {"count": crops, "size": LOCAL}} if crops else {}
    augmentation = {"crop": [0.3, 1.0]}  # not timed, except in whole steps
    chosen = {"augmentation": augmentation, "second": augmentation} if not crops else {}
    return cls(cls.Options(**HEAD, **chosen, **local), build_vit(args))


def run_passes(images: torch.Tensor, args: argparse.Namespace, crops: int) -> Iterator[None]:
    """Run DINO forward and backward on views that are made in advance."""
    hardware = compute(args.device)
    pretext = build_dino(args, crops)
    hardware.put(pretext)
    batch = Batch(images[: args.batch].to(hardware.device), None)
    views = pretext.views(batch, hardware.generator())
    while True:
        with hardware.autocast():
            loss = pretext(views).loss
        loss.backward()
        pretext.zero_grad()
        yield


def count_tokens(crops: int) -> int:
    """Tokens that the networks read for an image; the student's count three times."""
    in_global, in_local = ((side // PATCH) ** 2 + 1 for side in (SIDE, LOCAL))
    return 3 * (2 * in_global + crops * in_local) + 2 * in_global


def train_sslrun(images: torch.Tensor, args: argparse.Namespace) -> Iterator[None]:
    """Pretrain with sslrun, one step each time the iterator is advanced."""
    schedule = Schedule(epochs=1000, batch=args.batch, lr=0.001)
    training = Training(build_dino(args, args.locals), schedule, compute(args.device))
    examples = training.compute.place(TensorExamples(images, None, (), ImageSpec(SIDE)))
    for _ in train(training, examples, 0):
        yield


def train_lightly(images: torch.Tensor, args: argparse.Namespace) -> Iterator[None]:
    """Pretrain with lightly, one step each time the iterator is advanced."""
    transform = DINOTransform(
        global_crop_size=SIDE, local_crop_size=LOCAL, n_local_views=args.locals
    )
    pictures = [torchvision.transforms.functional.to_pil_image(image) for image in images]

    class Views(torch.utils.data.Dataset[list[torch.Tensor]]):
        """Augmented views of each picture: two global ones, then local ones."""

        def __len__(self) -> int:
            return len(pictures)

        def __getitem__(self, index: int) -> list[torch.Tensor]:
            return transform(pictures[index])

    loader = torch.utils.data.DataLoader(
        Views(), args.batch, shuffle=True, drop_last=True, num_workers=2
    )
    widths = (args.width, HEAD["hidden"], HEAD["bottleneck"], HEAD["outputs"])
    student, teacher = build_vit(args).to(args.device), build_vit(args).to(args.device)
    head, target = (DINOProjectionHead(*widths).to(args.device) for _ in range(2))
    loss = DINOLoss(output_dim=HEAD["outputs"]).to(args.device)
    optimizer = torch.optim.AdamW([*student.parameters(), *head.parameters()], lr=0.001)
    while True:
        for views in loader:
            on_device = [view.to(args.device) for view in views]
            with torch.no_grad():
                targets = [target(teacher(view).pooled) for view in on_device[:2]]
            outputs = [head(student(view).pooled) for view in on_device]
            loss(targets, outputs, epoch=0).backward()
            optimizer.step()
            optimizer.zero_grad()
            update_momentum(student, teacher, m=0.99)
            update_momentum(head, target, m=0.99)
            yield


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2, help="steps per block")
    parser.add_argument("--blocks", type=int, default=5, help="timed blocks of each")
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--locals", type=int, default=4, help="local views of each image")
    parser.add_argument("--width", type=int, default=192, help="width of the ViT")
    parser.add_argument("--depth", type=int, default=6, help="depth of the ViT")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    images = torch.randint(0, 256, (4 * args.batch, 3, SIDE, SIDE), dtype=torch.uint8)
    on_cpu = args.device == "cpu"
    passes = {
        "2 global views": run_passes(images, args, 0),
        f"and {args.locals} local views": run_passes(images, args, args.locals),
    }
    runs = {**passes, "sslrun, whole step": train_sslrun(images, args)}
    if HAS_LIGHTLY:
        runs["lightly, whole step"] = train_lightly(images, args)
    # Other processes on the machine do not count as time of a single process.
    clocks = dict.fromkeys(passes, time.process_time) if on_cpu else {}
    times = time_blocks(runs, args.steps, args.blocks, args.device, clocks)
    print(f"{args.device}, torch {torch.__version__}, batch {args.batch}")
    for name, time_ in times.items():
        print(f"{name:22} {1000 * time_:8.1f} ms")
    few, many = (times[name] for name in passes)
    share = count_tokens(args.locals) / count_tokens(0)
    print(
        f"local views: {many / few:.2f} times the time for {share:.2f} times the tokens, ", end=""
    )
    print(f"ratio {many / few / share:.2f}")
    if HAS_LIGHTLY:
        ratio = times["lightly, whole step"] / times["sslrun, whole step"]
        print(f"sslrun / lightly {ratio:.2f} in images/s")
    else:
        print("lightly is not installed: pip install 'sslrun[benchmarks]'")


if __name__ == "__main__":
    main()
