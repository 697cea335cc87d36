"""Two SimCLR views of an image (CIFAR-10's policy), on one core: sslrun beside lightly.

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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--blur", type=float, default=0.0, help="chance of blur; CIFAR-10's policy has none"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1024, 3, 32, 32), dtype=torch.uint8, generator=generator)
    pictures = [to_pil_image(image) for image in images[:256]]
    policy = Augmentation.simclr(0.5, blur=given.blur)
    transform = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=given.blur)
    rates: dict[str, list[float]] = {"sslrun": [], "lightly": []}
    for _ in range(given.repeats):
        began = time.perf_counter()
        for _ in range(2):
            policy(images, 32, generator)
        rates["sslrun"].append(len(images) / (time.perf_counter() - began))
        began = time.perf_counter()
        for picture in pictures:
            transform(picture)
        rates["lightly"].append(len(pictures) / (time.perf_counter() - began))
    medians = {name: statistics.median(each) for name, each in rates.items()}
    for name, rate in medians.items():
        print(f"{name:8} {rate:8.0f} images/s a core, two views each")
    print(f"ratio    {medians['sslrun'] / medians['lightly']:8.2f}")


if __name__ == "__main__":
    main()
