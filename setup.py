"""What pyproject.toml cannot say: the wheel holds the recipes, which lie beside the package in the source tree."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copy `recipes/` to `sslrun/recipes/` in a wheel; an editable install reads the source tree's own."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for recipe in sorted(Path("recipes").rglob("*.yaml")):
            target = Path(self.build_lib, "sslrun", recipe)
            self.mkpath(str(target.parent))
            self.copy_file(str(recipe), str(target))


setup(cmdclass={"build_py": BuildWithRecipes})
