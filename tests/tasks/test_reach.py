import math

import pytest
import torch

from sslrun.data.control.environments import make_environment
from sslrun.data.examples import TensorExamples
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.tasks.base import tasks
from sslrun.tasks.reach import Cells, describe_codes, entropy


def make(**options):
    return tasks["reach"](tasks["reach"].Options(**options), ImageSpec(48), ())


def draw(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_success_is_a_true_distance_within_the_limit():
    goals = torch.zeros(4, 2)
    ends = torch.tensor([[0.0, 0.09], [0.0, 0.11], [0.3, 0.4], [0.0, 0.0]])
    metrics = make().measure(ends, goals)
    assert metrics["success"] == 50
    assert metrics["final_distance"] == pytest.approx((0.09 + 0.11 + 0.5) / 4)
    assert make(within=0.2).measure(ends, goals)["success"] == 75


def test_coverage_is_the_entropy_of_cells():
    cells = Cells(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), 10)
    grid = torch.linspace(-0.95, 0.95, 20)
    points = torch.cartesian_prod(grid, grid)
    assert entropy(cells(points)) == pytest.approx(math.log(100))
    assert entropy(cells(points.repeat(3, 1))) == pytest.approx(math.log(100))
    assert entropy(cells(torch.zeros(5, 2))) == 0
    assert entropy(cells(torch.tensor([[-9.0, 0.0], [-1.0, 0.0]]))) == 0  # clipped


def test_codes_that_are_states_are_perfect_and_random_ones_say_nothing():
    known, states = draw(400, 2), draw(440, 2)[400:]
    same = describe_codes(known, known, states, states)
    assert same["neighbor_r2"] > 0.97
    assert same["rank_correlation"] == pytest.approx(100)
    random = describe_codes(torch.randn(400, 4), known, torch.randn(40, 4), states)
    assert random["neighbor_r2"] < 0.2
    assert abs(random["rank_correlation"]) < 30


def test_a_folded_space_is_read_by_neighbors_but_its_distances_mislead():
    known, states = draw(2000, 2), draw(2040, 2)[2000:]

    def fold(points):  # turns around several times
        angle = 4 * points[:, :1]
        return torch.cat([angle.cos(), angle.sin(), 0.3 * points[:, :1], points[:, 1:]], dim=1)

    folded = describe_codes(fold(known), known, fold(states), states)
    assert folded["neighbor_r2"] > 0.9
    assert folded["rank_correlation"] < 70


def test_goals_inside_walls_are_refused():
    environment, task = make_environment("point:wall"), make()
    task.check_goals(torch.tensor([[0.0, 0.0], [0.9, 0.9]]), environment)
    with pytest.raises(UserError, match=r"1 of 2 goals are inside walls of point:wall, such as"):
        task.check_goals(torch.tensor([[0.0, 0.0], [0.5, 0.0]]), environment)


def test_states_of_another_size_are_refused():
    with pytest.raises(UserError, match="states of 3 numbers, but those of point have 2"):
        make().check_goals(torch.zeros(1, 3), make_environment("point"))


def test_labels_that_are_classes_are_refused():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    classes = TensorExamples(images, torch.tensor([0, 1]), ("a", "b"), ImageSpec(4))
    with pytest.raises(UserError, match="needs the state that each picture shows"):
        make().targets(classes)
    states = TensorExamples(images, torch.zeros(2, 2), (), ImageSpec(4))
    assert make().targets(states).shape == (2, 2)
