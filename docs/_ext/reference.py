"""Sphinx extension: write the reference pages from the package itself, into docs/generated.

Components come from the registries, options from their pydantic models, and commands from the Typer
app. Nothing is copied by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import describe
import recipes_of
from pydantic import BaseModel
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
PAGE_EACH = ("pretext", "backbone")
"""Kinds whose components have a page each."""
PAGE_TOGETHER = ("data", "task", "protocol", "measurement")
"""Kinds whose components share a page."""
COMPONENT = "[component](#components)"
"""Type of a key that names a component."""
EVALUATION = """\
Without `data`, the entry's name is the data set. Without `task`, the data set's own task is used.
The options of a protocol stand under its name, and replace the recipe's for this task."""
SWEEP = "A sweep also needs the key `base`: the recipe that the rows change, or its path."


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", lambda app: write_pages(Path(app.srcdir) / "generated"))
    return {"version": "1", "parallel_read_safe": True}


def write_pages(folder: Path) -> None:
    """Write every generated page that changed, and remove those of components that are gone."""
    pages = {f"{name}.md": page for name, page in _pages()}
    for path in folder.rglob("*.md"):
        if path.relative_to(folder).as_posix() not in pages:
            path.unlink()
    for name, page in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != page:
            path.write_text(page, encoding="utf-8")


def _pages() -> Iterator[tuple[str, str]]:
    """Yield each page as its path without suffix, and its Markdown."""
    from sslrun.recipe.schema import Named

    describe.WORDS[Named] = COMPONENT
    components = _components()
    for kind in PAGE_EACH:
        for name, cls in components[kind].items():
            yield f"{kind}/{name}", _component_page(kind, name, cls)
        yield f"{kind}-list", _linked_list(kind, components[kind])
    for kind in PAGE_TOGETHER:
        yield f"{kind}-reference", _sections(kind, components.get(kind, {}))
    yield "corruptions", _corruptions()
    yield "recipe-keys", _recipe_keys()
    yield "nested-options", _nested_options(components)
    yield "command-reference", _commands()
    yield "shipped-recipes", _shipped_recipes()


# ---------------------------------------------------------------- components


def _components() -> dict[str, dict[str, type[Any]]]:
    """Return every registered class by kind and name."""
    import sslrun.claims.measurements
    import sslrun.protocols
    import sslrun.recipe  # noqa: F401 (importing fills the registries)
    from sslrun.registry import Registry

    components: dict[str, dict[str, type[Any]]] = {}
    for kind, registry in Registry.kinds.items():
        components[kind] = {name: registry[name] for name in registry.in_order}
    return components


def _component_page(kind: str, name: str, cls: type[Any]) -> str:
    """Render a component's page: docstring, facts, options, and recipes that use it."""
    blocks = [f"({kind}-{name})=\n# `{name}`", describe.docstring(cls), *_facts(cls)]
    blocks += ["## Options", describe.options(cls.Options)]
    if recipes := recipes_of.naming(kind, name):
        blocks += ["## Shipped recipes", *_recipe_blocks(recipes)]
    return _join(blocks)


def _recipe_blocks(recipes: dict[str, Path]) -> Iterator[str]:
    """Yield a list of recipes and, unless it is a sweep, the text of the first."""
    yield "\n".join(f"- `{name}`: {_first_sentence(path)}" for name, path in recipes.items())
    name, first = next(iter(recipes.items()))
    if "rows:" not in first.read_text(encoding="utf-8"):
        yield f"`{name}` in full:"
        source = first.relative_to(ROOT).as_posix()
        yield f"```{{literalinclude}} ../../../{source}\n:language: yaml\n```"


def _first_sentence(path: Path) -> str:
    from sslrun.shipped import summary

    return describe.text(summary(path))


def _sections(kind: str, classes: dict[str, type[Any]]) -> str:
    """Render one section for each component of a kind."""
    blocks = []
    for name, cls in classes.items():
        blocks += [f"({kind}-{name})=\n## `{name}`", describe.docstring(cls), *_facts(cls)]
        blocks.append(describe.options(cls.Options))
    return _join(blocks)


def _linked_list(kind: str, classes: dict[str, type[Any]]) -> str:
    """Render a table of a kind's components, with links to their pages."""
    from sslrun.registry import first_line
    from sslrun.stages.show import inputs_of

    rows = [
        (f"[`{name}`](#{kind}-{name})", inputs_of(cls) or "", describe.text(first_line(cls)))
        for name, cls in classes.items()
    ]
    return _join([describe.table((kind, "inputs", "what it is"), rows)])


def _facts(cls: type[Any]) -> Iterator[str]:
    """Yield a list of what a class declares in addition to options: inputs and capabilities."""
    from sslrun.stages.show import inputs_of

    facts = []
    if inputs := inputs_of(cls):
        facts.append(f"- Inputs: {inputs}")
    gives = getattr(cls, "gives", None)
    if gives and hasattr(cls, "reads"):  # a data source has no `reads`: `gives` is its inputs
        facts.append(f"- Gives the backbone: {gives.kind}")
    needs = getattr(cls, "needs", ())
    if callable(needs):  # a protocol's needs follow from its options
        needs = cls(cls.Options()).needs()
    if needs:
        facts.append(f"- Needs a backbone with: {', '.join(needs)}")
    if offers := getattr(cls, "offers", ()):
        facts.append(f"- Offers: {', '.join(sorted(offers))}")
    if (version := getattr(cls, "version", 1)) != 1:
        facts.append(f"- Version: {version}")
    if hasattr(cls, "describe") and hasattr(cls, "sketch"):
        facts += [
            f"- {name}: {describe.text(str(value))}" for name, value in cls.describe().items()
        ]
    if facts:
        yield "\n".join(facts)


def _corruptions() -> str:
    from sslrun.stages import show

    names: dict[str, str] = show.describe("corruption", None)["names"]
    rows = [(f"`{name}`", describe.text(about)) for name, about in names.items()]
    return _join([describe.table(("corruption", "strength at severity 1 to 5"), rows)])


# ---------------------------------------------------------------- recipes


def _recipe_keys() -> str:
    """Render the keys of recipes and sweeps, section by section."""
    from sslrun.data.shifts import Shift
    from sslrun.recipe import axes, schema

    sections: list[tuple[str, type[BaseModel], str]] = [
        ("A recipe", schema.Recipe, ""),
        ("`pretrain`", schema.Pretrain, ""),
        ("`watch`", schema.Watch, ""),
        ("`weights`", schema.Weights, ""),
        ("An entry of `evaluate`", schema.Evaluation, EVALUATION),
        ("An entry of `shifts`", Shift, ""),
        ("A sweep", schema.Sweep, SWEEP),
        ("`against`", schema.Against, ""),
        ("`random`", axes.Random, ""),
        ("`search`", axes.Search, ""),
        ("`search.objective`", axes.Objective, ""),
        ("A range", axes.Range, ""),
    ]
    blocks = []
    for title, model, note in sections:
        blocks += [f"({describe.anchor(model)})=\n### {title}", describe.docstring(model)]
        blocks += [note, describe.options(model, leave_out=("options",))]
    return _join(blocks)


def _nested_options(components: dict[str, dict[str, type[Any]]]) -> str:
    """Render the options that are mappings, such as `augmentation`; each appears once."""
    from sslrun.data.shifts import Shift
    from sslrun.recipe import schema

    classes = [cls.Options for kind in components.values() for cls in kind.values()]
    models: dict[type[BaseModel], None] = {}
    _add_nested([*classes, schema.Pretrain, schema.Watch, schema.Weights, Shift], models)
    blocks = []
    for model in sorted(filter(describe.has_fields, models), key=describe.title):
        blocks += [
            f"({describe.anchor(model)})=\n### {describe.title(model)}",
            describe.docstring(model),
        ]
        blocks.append(describe.options(model))
    return _join(blocks)


def _add_nested(parents: Iterable[type[BaseModel]], models: dict[type[BaseModel], None]) -> None:
    """Add the models that the fields of `parents` hold, at any depth, as keys of `models`."""
    for parent in parents:
        new = [nested for nested in describe.nested_models(parent) if nested not in models]
        models |= dict.fromkeys(new)
        _add_nested(new, models)


def _shipped_recipes() -> str:
    from sslrun.shipped import names

    rows = [(f"`{name}`", _first_sentence(path)) for name, path in names().items()]
    return _join([describe.table(("recipe", "what it is"), rows)])


# ---------------------------------------------------------------- commands


def _commands() -> str:
    import typer.main

    from sslrun import cli

    cli.add_protocol_commands(cli.app)
    group: Any = typer.main.get_command(cli.app)
    blocks = []
    for name, command in _leaves(group.commands):
        anchor = name.replace(" ", "-")
        blocks += [f"(command-{anchor})=\n## `sslrun {name}`", describe.text(command.help or "")]
        blocks.append(f"```\nsslrun {name} {' '.join(_usage(command))}\n```")
        blocks.append(
            describe.table(("argument or option", "default", "meaning"), _parameters(command))
        )
    return _join(blocks)


def _leaves(commands: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield commands and those of groups, with their names: "sweep", "runs ls"."""
    for name, command in commands.items():
        if hasattr(command, "commands"):
            yield from ((f"{name} {inner}", leaf) for inner, leaf in _leaves(command.commands))
        else:
            yield name, command


def _usage(command: Any) -> Iterator[str]:
    """Yield the arguments of a command as its usage line shows them."""
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            metavar = parameter.metavar or parameter.name.upper()
            yield metavar if parameter.required or metavar.startswith("[") else f"[{metavar}]"
    yield "[OPTION]..."


def _parameters(command: Any) -> Iterator[tuple[str, str, str]]:
    """Yield a table row for each argument and option: names, default, meaning."""
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        argument = parameter.param_type_name == "argument"
        names = [parameter.metavar or parameter.name.upper()] if argument else parameter.opts
        default = parameter.default
        no_default = (
            parameter.required or default is None or isinstance(default, bool) or callable(default)
        )
        meaning = describe.text(getattr(parameter, "help", None) or "")
        if variable := getattr(parameter, "envvar", None):
            meaning += f" Environment variable: `{variable}`."
        shown_default = "" if no_default else f"`{default}`"
        yield ", ".join(f"`{name}`" for name in names), shown_default, meaning


def _join(blocks: Iterable[str]) -> str:
    return "\n\n".join(block for block in blocks if block) + "\n"
