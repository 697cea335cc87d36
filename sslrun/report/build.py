"""Build a report of runs: choose what is drawn, within the page's limits of size and time."""

from __future__ import annotations

import html
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TypeVar

import yaml

import sslrun
from sslrun.errors import UserError
from sslrun.report.charts import Chart
from sslrun.report.collect import Material, collect
from sslrun.report.figures import (
    cost_against_score,
    in_and_out,
    label_efficiency,
    learning_curves,
    seed_of,
    title_of,
)
from sslrun.report.looks import Look, confusion, looks_of, mistakes, picture_of
from sslrun.report.page import Detail, Group, Report, Section, TextTable, render
from sslrun.report.texts import marked_answers, masked_texts
from sslrun.results.record import Predictions, RunRecord
from sslrun.results.table import Table
from sslrun.runs import check_output, write_atomically
from sslrun.stages.pretrain import SAMPLES

PICTURE_BYTES = 3_000_000
"""Most bytes of pictures from the folders of runs; what is beyond is named instead."""
CURVES, DETAILS = 100, 200
"""Largest number of runs with learning curves, and with their details."""
SHOWN, NAMED = 6, 10
"""Largest number of runs whose texts are shown, and of names in a note."""

DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""The dumper of libyaml if PyYAML has it, since it is several times faster."""

Say = Callable[[str], None]
T = TypeVar("T")


def write_report(
    targets: Sequence[Path], root: Path, output: Path, looks: int, command: Sequence[str], say: Say
) -> Path:
    """Write the report of sweeps and folders of runs as one file of HTML.

    `looks` is the largest number of pretrainings whose features are drawn, and of evaluations whose
    mistakes are. Raises UserError if there is no run, or if the file cannot be written.
    """
    check_output(output)
    material = collect(targets, root)
    report = build(material, looks, command, say)
    write_atomically(output, render(report), "name another place with --output")
    return output


def build(material: Material, looks: int, command: Sequence[str], say: Say) -> Report:
    """Build a report's sections; those without content are left out."""
    sections = [
        Section("Results", tables=[TextTable.of(table) for table in material.tables]),
        Section("Problems", notes=list(_problems(material))),
        Section("Comparisons", groups=_comparisons(material.tables)),
        _curves(material.pretrainings),
        _features(material.pretrainings, looks, say),
        _guesses(material.pretrainings),
        _predictions(material.tables, looks, say),
        _answers(material.tables),
        _pictures(material.runs),
        _details(material.runs),
    ]
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    about = f"{shlex.join(command)} · {when} · sslrun {sslrun.__version__}"
    return Report(material.title, about, [part for part in sections if not part.is_empty])


def _problems(material: Material) -> Iterator[str]:
    """Describe what is missing from the numbers, or makes them hard to compare."""
    if len(material.versions) > 1:
        yield f"runs of several versions of sslrun: {', '.join(material.versions)}"
    for name, reason in dict.fromkeys(material.problems):
        yield f"{name}: {reason}"


def _comparisons(tables: Sequence[Table]) -> list[Group]:
    """Draw the charts of each table of results; published comparisons have no records."""
    groups = []
    for table in tables:
        charts = [*cost_against_score(table), *label_efficiency(table), *in_and_out(table)]
        if charts:
            groups.append(Group(table.title, _drawn(charts)))
    return groups


def _drawn(charts: Iterable[Chart]) -> list[Look]:
    return [Look(chart.title, "", chart.html()) for chart in charts]


def _curves(pretrainings: Sequence[RunRecord]) -> Section:
    """Draw the learning curves of the last `CURVES` pretrainings."""
    charts = _drawn(learning_curves(pretrainings[-CURVES:]))
    if not charts:
        return Section("Learning curves")
    left = len(pretrainings) - CURVES
    notes = (
        [f"the first {left} of {len(pretrainings)} pretrainings are left out"] if left > 0 else []
    )
    return Section("Learning curves", notes, groups=[Group("", charts)])


def _one_per_recipe(pretrainings: Iterable[RunRecord]) -> list[RunRecord]:
    """Choose the first pretraining of each recipe."""
    chosen: dict[str, RunRecord] = {}
    for record in pretrainings:
        chosen.setdefault(repr({**record.identity, "seed": None}), record)
    return list(chosen.values())


def _features(pretrainings: Sequence[RunRecord], most: int, say: Say) -> Section:
    """Draw the features of the first finished pretraining of each recipe, `most` in all."""
    groups: list[Group] = []
    notes: list[str] = []
    chosen = _one_per_recipe(run for run in pretrainings if run.finished)
    if 0 < most < len(chosen):
        notes.append(f"the first {most} of {len(chosen)} recipes; --looks draws more")
    for record in chosen[:most]:
        say(f"drawing the features of {record.name}")
        if looks := _attempt(record, lambda record: list(looks_of(record)), notes):
            groups.append(Group(_titled(record), looks))
    return Section("Features", notes, groups=groups)


def _guesses(pretrainings: Sequence[RunRecord]) -> Section:
    """Show the guesses of masked language models, of one pretraining of each recipe."""
    groups: list[Group] = []
    notes: list[str] = []
    without = []
    for record in _one_per_recipe(pretrainings):
        looks = _attempt(record, masked_texts, notes)
        if looks:
            state = "" if record.finished else " · not finished: guesses of the last check"
            groups.append(Group(_titled(record) + state, looks))
        elif looks is not None and record.finished and record.tokens is not None:
            without.append(_titled(record))
    if len(groups) > SHOWN:
        notes.append(f"{len(groups) - SHOWN} more pretrainings are left out")
    if without:
        notes.append(
            f"no guesses of {_listed(without)}: only masked language models guess hidden tokens, "
            "and earlier versions kept none"
        )
    return Section("Masked guesses", notes, groups=groups[:SHOWN])


def _titled(pretraining: RunRecord) -> str:
    return f"{title_of(pretraining)} · {seed_of(pretraining)}"


def _listed(names: Sequence[str]) -> str:
    """Join names, at most `NAMED` of them."""
    left = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {left} more" if left > 0 else "")


def _predictions(tables: Sequence[Table], most: int, say: Say) -> Section:
    """Draw the confusions and mistakes of the best evaluations, at most `most` per table."""
    groups: list[Group] = []
    notes: list[str] = []
    for table in tables:
        records = _best_first(table) if most else []
        able = (run for run in records if _attempt(run, _predicted, notes) is not None)
        drawn = list(islice(able, most))
        if drawn and len(drawn) < len(records):
            notes.append(
                f"{table.title}: the best {most} of {len(records)} evaluations; --looks draws more"
            )
        for record in drawn:
            say(f"drawing the mistakes of {record.name}")
            looks = _attempt(record, _mistakes_of, notes) or []
            groups.append(Group(f"{record.row.title} · {record.labels.title}", looks))
    return Section("Predictions", notes, groups=groups)


def _best_first(table: Table) -> list[RunRecord]:
    """Sort a table's evaluations by their score on the test split."""
    return sorted(
        table.records,
        key=lambda run: run.metric.gain(run.test[run.metric.name], 0),
        reverse=True,
    )


def _predicted(record: RunRecord) -> Predictions | None:
    return record.predictions


def _answers(tables: Sequence[Table]) -> Section:
    """Show answers in passages, of the best evaluations of each table."""
    groups: list[Group] = []
    notes: list[str] = []
    for table in tables:
        questions = [run for run in _best_first(table) if "exact_match" in run.test]
        for record in questions[:SHOWN]:
            answers = _attempt(record, marked_answers, notes)
            title = f"{record.row.title} · {record.labels.title}"
            if answers == {}:
                version = record.environment.get("sslrun", "of an unknown version")
                notes.append(f"{title}: no answers were kept by sslrun {version}")
            groups += [Group(f"{title} · {kind}", looks) for kind, looks in (answers or {}).items()]
    return Section("Answers", notes, groups=groups)


def _mistakes_of(record: RunRecord) -> list[Look]:
    assert record.predictions is not None
    found = [confusion(record.predictions), mistakes(record, record.predictions)]
    return [look for look in found if look is not None]


def _attempt(record: RunRecord, read: Callable[[RunRecord], T], notes: list[str]) -> T | None:
    """Call `read`; if what it reads is missing or damaged, note the reason and return None."""
    try:
        return read(record)
    except UserError as error:
        notes.append(f"{record.name}: not drawn: {error}")
        return None


def _pictures(runs: Sequence[RunRecord]) -> Section:
    """Show the pictures and the samples of text that runs wrote, within the page's limit."""
    groups, left, size = [], 0, 0
    for run in runs:
        looks = []
        for path in run.pictures:
            if size > PICTURE_BYTES:
                left += 1
                continue
            element = picture_of(path)
            size += len(element)
            looks.append(Look(path.stem, "", element))
        if (samples := run.folder / SAMPLES).is_file():
            text = html.escape(samples.read_text(encoding="utf-8", errors="replace")[:20_000])
            looks.append(Look("samples", "", f"<pre>{text}</pre>"))
        if looks:
            groups.append(Group(run.name, looks))
    notes = [f"{left} more pictures are in the folders of their runs"] if left else []
    return Section("Pictures of runs", notes, groups=groups)


def _details(runs: Sequence[RunRecord]) -> Section:
    """List recipe, environment, command and lineage of each run; a recipe is shown once."""
    shown: set[str] = set()
    details = []
    for run in runs[:DETAILS]:
        text, key = "", repr(run.recipe)  # much faster than YAML
        if key not in shown:
            shown.add(key)
            text = yaml.dump(dict(run.recipe), Dumper=DUMPER, sort_keys=False, allow_unicode=True)
        details.append(Detail(f"{run.name} · {_described(run)}", list(_facts(run)), text))
    left = len(runs) - DETAILS
    return Section("Runs", [f"{left} more runs are left out"] if left > 0 else [], details=details)


def _described(run: RunRecord) -> str:
    """Describe a run by its row, labels and seed."""
    if not run.finished or not run.is_evaluation:
        return f"{title_of(run)} · {seed_of(run)}"
    return f"{run.row.title} · {run.task} · {run.labels.title} · seed {run.seed}"


def _facts(run: RunRecord) -> Iterator[tuple[str, str]]:
    """Yield name and value of what tells where a run's numbers are from."""
    for name, value in run.environment.items():
        if name == "command":
            yield name, shlex.join(map(str, value))
        elif value not in ({}, None):
            yield name, str(value)
    if run.pretraining is not None:
        yield "pretrained in", run.pretraining.name
    if run.probe is not None:
        yield "head from", run.probe.name
    if run.finished:
        yield "seconds", f"{run.seconds:,.1f}"
