"""Build steps that pyproject.toml cannot express: put the recipes into the wheel.

In the source tree, `recipes/` lies beside the package; in a wheel, inside it.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copy `recipes/` to `sslrun/recipes/` in a wheel.

    An editable install reads the recipes of the source tree.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for recipe in sorted(Path("recipes").rglob("*.yaml")):
            target = Path(self.build_lib, "sslrun", recipe)
            self.mkpath(str(target.parent))
            self.copy_file(str(recipe), str(target))


setup(cmdclass={"build_py": BuildWithRecipes})
