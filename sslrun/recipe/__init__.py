"""Recipes and sweeps: YAML files read into typed objects; errors name file, line and key."""

from sslrun.recipe.build import load, load_sweep, parse, validated, vary
from sslrun.recipe.schema import Evaluation, Named, Pretrain, Recipe, Sweep, Watch, Weights

__all__ = [
    "Evaluation",
    "Named",
    "Pretrain",
    "Recipe",
    "Sweep",
    "Watch",
    "Weights",
    "load",
    "load_sweep",
    "parse",
    "validated",
    "vary",
]
