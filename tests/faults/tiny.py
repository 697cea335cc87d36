"""Tiny recipes: one for each pretext task, and one for each protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

GOLDEN = Path(__file__).parents[1] / "golden" / "recipes.yaml"
OFTEN = 1e-9
"""Minutes between checkpoints: one after every step."""


def pretext_recipes() -> dict[str, dict[str, Any]]:
    """Name of each pretext task -> a recipe that pretrains with it, in a few steps."""
    recipes = {}
    for name, recipe in yaml.safe_load(GOLDEN.read_text())["recipes"].items():
        if "evaluate" not in recipe:
            recipes[name] = {"name": name, **recipe, "watch": {"every": 1, "examples": 64}}
    recipes["colorize"] = {
        **recipes["rotation"],
        "name": "colorize",
        "backbone": {"name": "resnet18", "stem": "small", "channels": 4},
        "pretext": {"name": "colorize", "hidden": 16},
        "data": {"name": "pictures", "pictures": 60, "size": 32},
    }
    return recipes


def protocol_recipes() -> dict[str, dict[str, Any]]:
    """Name of each protocol -> a recipe that evaluates with it alone, some after its probe."""
    golden = yaml.safe_load(GOLDEN.read_text())["recipes"]
    of_images, of_texts = golden["digits"], golden["world"]
    short = {"steps": 6, "batch": 16, "optimizer": "sgd", "precision": "fp32"}
    of_images = {
        **of_images,
        "finetune": {**short, "lr": [0.02, 0.05]},
        "probe": {"solver": "sgd", "sgd": {**short, "lr": 0.02}},
        "attentive": {**short, "lr": 0.01},
    }
    recipes = {}
    on_vectors = ("knn", "fewshot", "logistic-regression", "nearest-neighbors", "random-forest")
    for name in (*on_vectors, "svm", "probe", "finetune", "scratch", "lpft", "attentive"):
        evaluation = {"protocols": ["probe", "lpft"] if name == "lpft" else [name], "labels": [0.1]}
        recipe = {**of_images, "name": name, "evaluate": {"digits": evaluation}}
        if name == "fewshot":
            recipe["fewshot"] = {"shots": [5]}
        recipes[name] = recipe
    texts = {**of_texts, "name": "texts", "finetune": {**of_texts["finetune"], "steps": 6}}
    recipes["texts"] = {**texts, "evaluate": {"sentiment": of_texts["evaluate"]["sentiment"]}}
    films = golden["walk"]
    for name in ("propagate", "copy"):
        recipes[name] = {
            "name": name, **films, "evaluate": {"moving-digits": {"protocols": [name]}},
        }  # fmt: skip
    for name in ("rollout", "random-actions"):
        recipes[name] = {
            "name": name, **golden["actions"],
            "evaluate": {"paths": {"protocols": [name], "rollout": {"episodes": 4}}},
        }  # fmt: skip
    recipes["attend"] = {
        "name": "attend",
        "backbone": {"name": "vit-tiny", "patch": 4, "depth": 2, "width": 24, "heads": 3},
        "pretext": "rotation",
        "data": {"name": "stamps", "size": 16, "train": 40, "test": 20},
        "pretrain": {"steps": 4, "batch": 16, "lr": 0.001},
        "watch": {"every": 1000, "examples": 64},
        "evaluate": {"stamps": {"protocols": ["attend"]}},
    }
    recipes["practice"] = {
        "name": "practice",
        "backbone": {"name": "mlp", "width": 16, "depth": 1},
        "pretext": {"name": "autoencoder", "latent": 3, "beta": 0.1, "channels": 8},
        "data": {"name": "pictures", "pictures": 60, "size": 16},
        "pretrain": {"steps": 4, "batch": 16, "lr": 0.001},
        "watch": {"every": 1000, "examples": 64},
        "evaluate": {"pictures": {"protocols": ["practice"]}},
        "practice": {
            "steps": 60, "warmup": 30, "parallel": 3, "horizon": 10, "batch": 8, "episodes": 5,
        },
    }  # fmt: skip
    return recipes


def recipes_of_two() -> dict[str, dict[str, Any]]:
    """Name -> a recipe that two processes pretrain with, each with all parameters or with half."""
    base = pretext_recipes()["rotation"]
    return {
        name: {**base, "name": name, "pretrain": {**base["pretrain"], "parallel": name}}
        for name in ("ddp", "fsdp")
    }


def _draw_stamps(folder: Path) -> None:
    """Draw the objects that the recipe of `attend` pastes on photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(4):
        image = Image.new("RGBA", (24, 24))
        ImageDraw.Draw(image).ellipse((2, 2, 12 + 3 * number, 21), fill=(60 * number, 99, 9, 255))
        image.save(folder / f"{number}.png")


def write(recipe: dict[str, Any], folder: Path, minutes: float = OFTEN) -> Path:
    """Write a recipe, and the files that it reads, with `minutes` between its checkpoints."""
    if recipe["data"]["name"] == "stamps":
        _draw_stamps(folder / "data" / "stamps")
    path = folder / f"{recipe['name']}.yaml"
    watch = {**recipe.get("watch", {}), "checkpoint": minutes}
    path.write_text(yaml.safe_dump({**recipe, "watch": watch}, sort_keys=False))
    return path
