"""Verdicts on planted results, and coverage of the intervals."""

import numpy as np
import pytest

from sslrun.claims.verdict import Gain, Inequality, combine
from sslrun.metric import Metric
from sslrun.results.address import Column, Labels, Row
from sslrun.results.paired import Verdict, judge
from sslrun.results.table import Table


def by_seed(values):
    return dict(enumerate(values))


@pytest.mark.parametrize("seeds", [3, 5, 20])
def test_planted_differences_give_each_verdict(seeds):
    noise = np.random.default_rng(1)
    shared = 50 + 10 * noise.standard_normal(
        seeds
    )  # an effect of the seed, which cancels in a paired difference
    a, b = (by_seed(shared + gap + 0.3 * noise.standard_normal(seeds)) for gap in (4, 0))
    assert judge(a, b).word == "supported"
    assert judge(b, a).word == "contradicted"
    assert judge(a, b, 4.0).word == "inconclusive"
    assert judge(a, b, 8.0).word == "contradicted"
    # The same values at other seeds are unpaired: seed effects hide the difference.
    a, b = by_seed([14.0, 54.1, 94.2]), by_seed([10.0, 50.0, 90.0])
    assert judge(a, b).word == "supported"
    assert judge(a, {0: b[2], 1: b[0], 2: b[1]}).word == "inconclusive"


def test_the_t_interval_equals_textbook_values():
    verdict = judge(by_seed([3.0, 4.0, 5.0]), by_seed([1.0, 1.0, 1.0]))
    assert verdict.difference == 3
    assert verdict.interval == pytest.approx(
        (3 - 4.302653 / 3**0.5, 3 + 4.302653 / 3**0.5), abs=1e-5
    )
    assert verdict.method == "t interval"
    assert verdict.text() == "supported: +3.00 [+0.52, +5.48] over 3 seeds (t interval)"


def test_the_bootstrap_is_deterministic_and_near_t_for_many_seeds():
    values = by_seed(np.random.default_rng(0).standard_normal(200))
    zero = dict.fromkeys(values, 0.0)
    verdict = judge(values, zero)
    assert verdict == judge(values, zero)
    assert verdict.method == "bootstrap"
    error = np.std(list(values.values()), ddof=1) / 200**0.5
    assert np.subtract(verdict.interval, verdict.difference) == pytest.approx(
        [-1.972 * error, 1.972 * error], rel=0.06
    )


@pytest.mark.parametrize(("seeds", "restarts"), [(3, 1), (3, 5), (10, 3)])
def test_intervals_have_their_nominal_coverage(seeds, restarts):
    """Restarts share the deviation of their pretraining, which is as large as their own."""
    trials, noise = 600, np.random.default_rng(10 * seeds + restarts)
    of_pretraining = noise.standard_normal((trials, seeds, 1))
    draws = of_pretraining + noise.standard_normal((trials, seeds, restarts))
    covered = 0
    for trial in draws:
        table, places = with_restarts(SimCLR=trial, zero=np.zeros_like(trial))
        verdict = Inequality(places["SimCLR"], places["zero"]).judge(table)
        covered += verdict.interval[0] < 0 < verdict.interval[1]
    assert 0.93 <= covered / trials <= 0.97  # two points are 2.2 standard errors


def with_restarts(**cells):
    """A table with a cell per name from its values (seeds, restarts), and the cells' places."""
    table, column = Table("t"), Column("digits")
    for name, by_seed in cells.items():
        for seed, values in enumerate(by_seed):
            for restart, value in enumerate(values):
                key = f"{seed}.{restart}" if restart else str(seed)
                table.add(Row(name), column, float(value), key, pretraining=str(seed))
    return table, {name: (Row(name), column) for name in cells}


def test_restarts_of_one_pretraining_never_decide():
    table, at = with_restarts(a=[[80.0, 80.1, 80.2]], b=[[50.0, 50.3, 50.1]])
    verdict = Inequality(at["a"], at["b"]).judge(table)
    assert (verdict.word, verdict.seeds, verdict.restarts) == ("inconclusive", 1, 3)
    assert "over 3 restarts of one pretraining (t interval)" in verdict.text()
    bound = Inequality(at["a"], 10.0).judge(table)
    assert (bound.word, bound.restarts) == ("inconclusive", 3)
    gain = Gain(at["a"], at["b"])
    assert Inequality(gain, 10.0).judge(table).word == "inconclusive"


def test_restarts_are_averaged_within_each_seed():
    a, b = [[1.0, 3.0], [2.0, 4.0], [2.0, 5.0]], [[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    table, at = with_restarts(a=a, b=b)
    verdict = Inequality(at["a"], at["b"]).judge(table)
    assert verdict == judge(by_seed([2.0, 3.0, 3.5]), by_seed([0.0, 0.5, 0.0]))
    assert verdict.seeds == 3
    copy = Table("copy")
    copy.add_cells(table.as_dict())
    assert Inequality(at["a"], at["b"]).judge(copy) == verdict


def test_one_seed_or_identical_seeds_are_inconclusive():
    alone = judge({0: 90.0}, {0: 80.0})
    assert (alone.word, alone.interval) == ("inconclusive", None)
    assert "one seed alone (+10.00)" in alone.text()
    same = judge({0: 1.0, 1: 1.0}, {0: 0.0, 1: 0.0})
    assert (same.word, same.reason) == (
        "inconclusive",
        "the seeds all give the same difference (+1.00)",
    )


def test_only_seeds_present_on_both_sides_count():
    verdict = judge({0: 5.0, 1: 6.0, 2: 7.1, 9: -100.0}, {0: 1.0, 1: 2.1, 2: 3.0, 8: 100.0})
    assert (verdict.word, verdict.seeds) == ("supported", 3)
    assert judge({0: 1.0}, {1: 1.0}).reason == "no seed has both"
    diverged = judge(by_seed([1.0, float("nan"), 2.0]), by_seed([0.0, 0.0, 0.0]))
    assert (diverged.word, diverged.reason) == ("inconclusive", "not a number at seed 1")


def test_a_claim_is_supported_by_all_of_its_inequalities_and_contradicted_by_any():
    yes, no, perhaps = (Verdict(word, 3) for word in ("supported", "contradicted", "inconclusive"))
    assert combine([yes, yes]) == "supported"
    assert combine([yes, perhaps]) == "inconclusive"
    assert combine([perhaps, no, yes]) == "contradicted"
    assert combine([]) == "inconclusive"


def test_inequalities_read_the_cells_of_a_table():
    table, column = Table("t"), Column("digits", Labels(0.1))
    for seed, (low, high) in enumerate([(60, 80), (61, 80.5), (62, 83)]):
        table.add(Row("no pretraining", "probe"), column, low, seed)
        table.add(Row("SimCLR", "probe"), column, high, seed)
    places = (Row("SimCLR", "probe"), column), (Row("no pretraining", "probe"), column)
    assert Inequality(*places).judge(table).word == "supported"
    assert Inequality(*reversed(places)).judge(table).word == "contradicted"
    assert Inequality(*places, margin=20).judge(table).word == "inconclusive"
    assert (
        "not computed: BYOL · probe · digits · 10 %"
        in Inequality((Row("BYOL", "probe"), column), places[1]).judge(table).text()
    )


def planted(metric=None, **cells):
    table, column = Table("t"), Column(metric=metric or Metric("x"))
    for name, values in cells.items():
        for seed, value in enumerate(values):
            table.add(Row(name), column, value, str(seed))
    return table, {name: (Row(name), column) for name in cells}


def test_a_gain_is_paired_seed_by_seed():
    table, cells = planted(a=[30, 50.1, 70], b=[20, 40, 60.2], c=[5, 25, 45], d=[3, 23.1, 43])
    inequality = Inequality(Gain(cells["a"], cells["b"]), Gain(cells["c"], cells["d"]))
    verdict = inequality.judge(table)
    assert (verdict.word, verdict.seeds) == ("supported", 3)
    assert verdict.difference == pytest.approx((10 + 10.1 + 9.8) / 3 - (2 + 1.9 + 2) / 3)
    assert inequality.means(table) == pytest.approx(((10 + 10.1 + 9.8) / 3, (2 + 1.9 + 2) / 3))
    assert (
        Inequality(Gain(cells["c"], cells["d"]), Gain(cells["a"], cells["b"])).judge(table).word
        == "contradicted"
    )
    assert (
        Inequality(Gain(cells["a"], cells["b"]), cells["c"], 1.0).text()
        == "(a · x - b · x) > c · x + 1"
    )


def test_a_bound_needs_no_variance():
    table, cells = planted(a=[1e-15, 1e-15], b=[1e-15, 3e-15], c=[2.0, 2.0], one=[0.0])
    assert Inequality(1e-12, cells["a"]).judge(table).word == "supported"
    assert Inequality(1e-12, cells["a"]).judge(table).method == "the same at every seed"
    assert Inequality(1e-12, cells["b"]).judge(table).word == "supported"
    assert Inequality(1e-12, cells["c"]).judge(table).word == "contradicted"
    assert Inequality(cells["c"], 1.0).judge(table).word == "supported"
    assert Inequality(cells["c"], 2.0).judge(table).word == "contradicted"
    assert (
        Inequality(1e-12, cells["one"]).judge(table).word == "inconclusive"
    )  # one seed decides nothing
    assert (
        Inequality(cells["c"], cells["a"]).judge(table).word == "inconclusive"
    )  # a difference between cells may be chance


def test_better_and_worse_follow_the_metric_greater_and_lesser_the_number():
    values = {"a": [1.0, 2.1, 3.0], "b": [5.0, 6.0, 7.3]}
    table, cells = planted(Metric("mae", "eV", "lower"), **values)
    assert Inequality(cells["a"], cells["b"]).judge(table).word == "contradicted"
    better = Inequality(cells["a"], cells["b"], 3.0, by_metric=True)
    assert better.judge(table).word == "supported"
    assert better.means(table) == pytest.approx((6.1 / 3, 18.3 / 3))  # the plain numbers
    assert better.text() == "a · mae is better than b · mae by 3"
    assert Inequality(cells["b"], cells["a"], by_metric=True).judge(table).word == "contradicted"
    assert Inequality(cells["a"], 9.0, by_metric=True).judge(table).word == "supported"
    gain = Gain(cells["a"], cells["b"])  # an improvement of 4
    assert Inequality(gain, 3.0, by_metric=True).judge(table).word == "supported"
    assert Inequality(gain, 3.0).judge(table).word == "contradicted"
    higher, cells = planted(Metric("r2", ""), **values)
    assert Inequality(cells["b"], cells["a"], 3.0, by_metric=True).judge(higher).word == "supported"
