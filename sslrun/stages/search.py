"""Search the best values of a row: trials on validation data; only the best one is tested.

Each trial is a job, so that workers share a search as they share any other runs. A trial takes its
values from Optuna when a worker begins it; Optuna's journal lies beside the runs. A row has no
cells until all of its trials are done. Then the values of the best one are the row's.
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslrun import distributed
from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.recipe import Named, Recipe, Sweep, vary
from sslrun.recipe.axes import Range, Search, name_point
from sslrun.runs import Run, digest
from sslrun.seeds import derive_seed
from sslrun.stages.context import Context, holding, perform
from sslrun.stages.evaluate import Cell, cells
from sslrun.stages.pretrain import Pretraining
from sslrun.stages.reporting import format_duration
from sslrun.training.loop import NonFinite, Step

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

JOURNAL = "search.journal"
"""Name of Optuna's file in the sweep's folder."""
STARTUP, STARTUP_SHARE = 10, 3
"""TPE begins after this many random trials, but at most after this part of all (our choice)."""
HALVING = 3
"""One trial in this number goes on from a check to the next one that counts (our choice)."""
NUMBER = "number"
"""Attribute of Optuna's trials: which trial of the search it is."""


class Pruned(Exception):
    """A trial's pretraining is worse than those of other trials at the same check."""


@dataclass(frozen=True)
class Trial:
    """A job: pretrain and evaluate with values that follow from the trials before."""

    sweep: Sweep
    row: str
    number: int
    study: str
    """Name of Optuna's study: a hash of what determines the search of the row."""
    root: Path
    needs: tuple[Any, ...] = ()

    @property
    def search(self) -> Search:
        assert self.sweep.search is not None
        return self.sweep.search

    @property
    def recipe(self) -> Recipe:
        return self.sweep.rows[self.row]

    @property
    def title(self) -> str:
        return f"{self.row} · trial {self.number + 1} of {self.search.trials}"

    @property
    def reads(self) -> tuple[Named, ...]:
        """The data sets that the job reads."""
        return (self.recipe.data, *self.recipe.evaluate[self.search.objective.task].reads)

    @cached_property
    def run(self) -> Run:
        return Run(self.root, self.recipe.name, "trial", {"study": self.study, NUMBER: self.number})

    def execute(self, context: Context) -> dict[str, Any]:
        """Make the trial unless it is finished, and return its result.

        Raises UserError if Optuna is not installed.
        """
        body = partial(self._body, context)
        return perform(self.run, self.recipe.resolved(), context, body, self.reads)

    def _body(self, context: Context) -> dict[str, Any]:
        if distributed.world_size() > 1:
            raise UserError("search: trials run on one device each: use --jobs, not torchrun")
        began = time.monotonic()
        study = self._open_study()
        asked = self._find(study) or self._ask(study)
        values = _decode(self.search, asked.params)
        outcome = self._try(values, partial(self._judge, study, asked), context)
        if not asked.state.is_finished():
            self._tell(study, asked, outcome)
        return {
            "stage": "trial",
            "recipe": self.recipe.name,
            "row": self.row,
            "values": values,
            **outcome,
            "seconds": round(time.monotonic() - began, 3),
        }

    def _try(
        self,
        values: Mapping[str, Any],
        judge: Callable[[Recipe, Step, Any], None],
        context: Context,
    ) -> dict[str, Any]:
        """Pretrain and evaluate with some values, and return what came out, as JSON values."""
        runs: list[str] = []
        try:
            recipe = vary(self.sweep, self.row, values)
            cell = objective_cell(recipe, self.search, self.sweep.seeds[0], self.root)
        except UserError as error:  # values that exclude each other
            return {"state": "failed", "reason": str(error), "runs": runs}
        watched = (
            context
            if self.search.prune is None
            else replace(context, on_check=partial(judge, recipe))
        )
        try:
            for job in (*cell.needs, cell):
                runs.append(job.run.hash)
                self.run.log({"run": job.run.path.name})  # whose progress is the trial's
                result = job.execute(watched)
        except NonFinite as error:
            return {"state": "failed", "reason": str(error), "runs": runs}
        except Pruned as reason:
            for need in cell.needs:
                if isinstance(need, Pretraining):
                    need.run.fail(f"stopped early: {reason}")
            return {"state": "pruned", "reason": str(reason), "runs": runs}
        metric = result["metric"]
        val = result["metrics"]["val"]
        if not math.isfinite(val[metric["name"]]):
            return {"state": "failed", "reason": "the score is not finite", "runs": runs}
        return {"state": "complete", "metric": metric, "metrics": {"val": val}, "runs": runs}

    # ------------------------------------------------------------ Optuna

    def _open_study(self) -> Study:
        """Open the study in the journal beside the runs, with a sampler for this trial."""
        optuna = import_optuna()
        path = self.root / self.sweep.name / JOURNAL
        path.parent.mkdir(parents=True, exist_ok=True)
        journal = optuna.storages.journal
        search = self.search
        try:
            return optuna.create_study(
                storage=optuna.storages.JournalStorage(
                    journal.JournalFileBackend(str(path), _JournalLock(path))
                ),
                study_name=self.study,
                direction="maximize",  # scores are negated if lower is better
                load_if_exists=True,
                # A seed for each trial, so that a search that was killed goes on as it would have.
                sampler=optuna.samplers.TPESampler(
                    seed=derive_seed(search.seed, self.number) % 2**32,
                    n_startup_trials=max(1, min(STARTUP, search.trials // STARTUP_SHARE)),
                ),
                pruner=optuna.pruners.SuccessiveHalvingPruner(
                    min_resource=1, reduction_factor=HALVING
                ),
            )
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{path}: damaged ({error}); remove it: finished trials are kept, but those to "
                "come do not learn from them"
            ) from None

    def _find(self, study: Study) -> FrozenTrial | None:
        """Return Optuna's record of this trial, if a process has begun it before."""
        same = [asked for asked in study.trials if asked.user_attrs.get(NUMBER) == self.number]
        return same[-1] if same else None

    def _ask(self, study: Study) -> FrozenTrial:
        """Choose the values of the trial by the results of the others."""
        asked = study.ask(_distributions(self.search))
        asked.set_user_attr(NUMBER, self.number)
        found = self._find(study)
        assert found is not None
        return found

    def _tell(self, study: Study, asked: FrozenTrial, outcome: Mapping[str, Any]) -> None:
        """Record the outcome of the trial for those to come."""
        from optuna.trial import TrialState

        states = {"failed": TrialState.FAIL, "pruned": TrialState.PRUNED}
        if outcome["state"] in states:
            study.tell(asked.number, state=states[outcome["state"]])
            return
        metric = Metric(**outcome["metric"])
        score = outcome["metrics"]["val"][metric.name]
        study.tell(asked.number, score if metric.better == "higher" else -score)

    def _judge(
        self, study: Study, asked: FrozenTrial, recipe: Recipe, step: Step, record: dict[str, float]
    ) -> None:
        """Report a feature check to Optuna. Raises Pruned if the trial must stop."""
        from optuna.trial import Trial as LiveTrial

        diagnostic = self.search.prune
        assert diagnostic is not None
        if step.last or asked.state.is_finished():
            return
        if diagnostic not in record:
            raise UserError(
                f"search.prune: feature checks give no {diagnostic} for these data, which have no "
                "classes: take rankme"
            )
        check = max(1, round(step.epoch / recipe.watch.every))
        live = LiveTrial(study, asked._trial_id)
        # A trial that was killed reports some checks twice; the first report stays.
        if check not in study.trials[asked.number].intermediate_values:
            live.report(record[diagnostic], check)
        if live.should_prune():
            raise Pruned(
                f"{diagnostic} {record[diagnostic]:.1f} at epoch {step.epoch:.1f} is not in the "
                f"best third"
            )


class _JournalLock:
    """A lock of the journal that ends with the process that holds it.

    Optuna's own locks stay when a process is killed. A line that such a process left unfinished is
    removed, since nothing could be read after it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: Any = None

    def acquire(self) -> bool:
        self.file = open(f"{self.path}.lock", "w")  # noqa: SIM115 (closed by release)
        fcntl.flock(self.file, fcntl.LOCK_EX)
        with open(self.path, "rb+") as journal:
            content = journal.read()
            if not content.endswith(b"\n"):
                journal.truncate(content.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self.file.close()


def import_optuna() -> Any:
    """Import Optuna, and silence its log. Raises UserError if it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UserError("search: needs optuna: pip install 'sslrun[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _distributions(search: Search) -> dict[str, Any]:
    """Return the search's space in Optuna's terms."""
    from optuna import distributions

    space: dict[str, Any] = {}
    for key, values in search.space.items():
        if not isinstance(values, Range):
            labels = [_label(value) for value in values]
            space[key] = distributions.CategoricalDistribution(labels)
        elif values.integer:
            low, high = map(int, values.ends)
            space[key] = distributions.IntDistribution(low, high, log=values.log is not None)
        else:
            space[key] = distributions.FloatDistribution(*values.ends, log=values.log is not None)
    return space


def _decode(search: Search, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the recipe's keys that Optuna's parameters mean."""
    values: dict[str, Any] = {}
    for key, choices in search.space.items():
        if isinstance(choices, Range):
            values[key] = choices.round(parameters[key])
        else:
            values[key] = next(value for value in choices if _label(value) == parameters[key])
    return values


def _label(value: Any) -> str:
    """Return a choice as text, since Optuna's journal does not hold mappings."""
    return json.dumps(value, sort_keys=True)


# ---------------------------------------------------------------- rows


def objective_cell(recipe: Recipe, search: Search, seed: int, root: Path) -> Cell:
    """Return the cell of a recipe that a search compares, scored on validation alone."""
    objective = search.objective
    found = [
        cell
        for cell in cells(recipe, seed, root, [objective.protocol])
        if cell.task == objective.task and objective.labels in (None, cell.labels)
    ]
    last = max(place for place, cell in enumerate(found) if cell.restart == 0)
    return replace(found[last], validation_only=True)


@dataclass(frozen=True)
class RowSearch:
    """The search of a row: all of its trials, finished or not."""

    sweep: Sweep
    row: str
    trials: tuple[Trial, ...]

    @property
    def results(self) -> list[dict[str, Any]]:
        return [trial.run.result for trial in self.trials if trial.run.finished]

    @property
    def finished(self) -> bool:
        return all(trial.run.finished for trial in self.trials)

    @property
    def best(self) -> dict[str, Any] | None:
        """The result of the best trial (ties: the first); None if there is none yet."""
        best: dict[str, Any] | None = None
        for result in self.results:
            if result["state"] != "complete":
                continue
            if best is None or _metric(result).gain(_score(result), _score(best)) > 0:
                best = result
        return best

    def describe(self) -> str:
        """Describe in one line how many trials there are and what they have found."""
        results, best = self.results, self.best
        counts = dict.fromkeys(("pruned", "failed"), 0)
        for result in results:
            if result["state"] in counts:
                counts[result["state"]] += 1
        others = "".join(f", {count} {state}" for state, count in counts.items() if count)
        time = format_duration(sum(result["seconds"] for result in results))
        trials = f"{len(results)} of {len(self.trials)} trials{others}, {time}"
        if best is None:
            return f"{self.row}: {trials}: none has a score"
        objective, metric = self.trials[0].search.objective, _metric(best)
        found = f"{metric.text(_score(best))} {metric.title} of {objective.protocol}"
        where = f"on the validation data of {objective.task}"
        return f"{self.row}: {name_point(best['values'])}: best of {trials}, by {found} {where}"

    def clear(self) -> None:
        """Delete the trials, the runs that they made, and what Optuna knows of them."""
        for trial in (trial for trial in self.trials if trial.run.path.exists()):
            with holding(trial.run):
                for name in trial.run.result["runs"] if trial.run.finished else ():
                    for folder in trial.run.path.parent.glob(f"*-{name}"):
                        shutil.rmtree(folder)
                trial.run.clear()
        journal = self.trials[0].root / self.sweep.name / JOURNAL
        journal.unlink(missing_ok=True)


def _metric(result: Mapping[str, Any]) -> Metric:
    return Metric(**result["metric"])


def _score(result: Mapping[str, Any]) -> float:
    return float(result["metrics"]["val"][_metric(result).name])


def row_searches(sweep: Sweep, root: Path) -> tuple[RowSearch, ...]:
    """Return the search of each row; none if the sweep does not search."""
    search = sweep.search
    if search is None:
        return ()
    searches = []
    for row, recipe in sweep.rows.items():
        cell = objective_cell(recipe, search, sweep.seeds[0], root)
        # The number of trials is left out, so that more of them continue the search.
        chosen = search.model_dump(mode="json", exclude={"trials", "objective"})
        study = digest({"cell": cell.run.hash, **chosen})
        trials = tuple(Trial(sweep, row, number, study, root) for number in range(search.trials))
        searches.append(RowSearch(sweep, row, trials))
    return tuple(searches)


def chosen_rows(rows: Mapping[str, Recipe], searches: tuple[RowSearch, ...]) -> dict[str, Recipe]:
    """Return the rows with the values that searches have chosen, without those that go on."""
    chosen = dict(rows)
    for search in searches:
        best = search.best if search.finished else None
        if best is None:
            del chosen[search.row]
        else:
            chosen[search.row] = vary(search.sweep, search.row, best["values"])
    return chosen
