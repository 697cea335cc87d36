"""Time two SimCLR views per image on one core (CIFAR-10's policy): sslrun and lightly.

python benchmarks/augment.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from torchvision.transforms.functional import to_pil_image

from sslrun.data.image.augment import Augmentation

try:
    from lightly.transforms import SimCLRTransform
except ImportError:
    sys.exit("lightly is not installed: pip install 'sslrun[benchmarks]'")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="number of timed repetitions")
    parser.add_argument(
        "--blur", type=float, default=0.0, help="probability of blur; 0 in CIFAR-10's policy"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1024, 3, 32, 32), dtype=torch.uint8, generator=generator)
    pictures = [to_pil_image(image) for image in images[:256]]
    policy = Augmentation.simclr(0.5, blur=args.blur)
    transform = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=args.blur)
    rates: dict[str, list[float]] = {"sslrun": [], "lightly": []}
    for _ in range(args.repeats):
        start = time.perf_counter()
        for _ in range(2):
            policy(images, 32, generator)
        rates["sslrun"].append(len(images) / (time.perf_counter() - start))
        start = time.perf_counter()
        for picture in pictures:
            transform(picture)
        rates["lightly"].append(len(pictures) / (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        print(f"{name:8} {rate:8.0f} images/s per core, two views per image")
    print(f"ratio    {medians['sslrun'] / medians['lightly']:8.2f}")


if __name__ == "__main__":
    main()
