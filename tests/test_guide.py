"""The guide's script runs, and its learned loss is as good as the guide says."""

import pathlib
import re

import pytest

pytestmark = pytest.mark.slow
GUIDE = pathlib.Path(__file__).parents[1] / "docs" / "guide.md"


@pytest.fixture(scope="module")
def names() -> dict:
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    return names


def test_the_learned_loss_beats_the_plain_loss_at_its_best_step_size(names):
    assert names["learned_error"][-1] < 0.75 * min(names["plain_errors"].values())


def test_the_learned_penalty_pulls_more_towards_ranges_that_seem_too_short(names):
    pull = names["pull"]
    assert pull(0.5) > 3.0 * pull(-0.5)


def test_the_best_loss_by_validation_is_at_least_as_good_as_the_first(names):
    trained = names["trained"]
    assert trained.best_value <= float(names["validate"](names["state"].loss_params)) + 1e-6
    assert trained.best_step in (500, 550, 600)


def test_maml_with_a_learned_step_size_trains(names):
    losses = names["maml_metrics"].task_loss
    assert losses[-20:].mean() < 0.8 * losses[:20].mean()
    assert names["adapted"].trace["error_m"].shape == (6,)


def test_a_meta_step_of_sharded_optimizees_is_taken(names):
    assert int(names["large_state"].step) == 1
    assert float(names["large_metrics"].meta_grad_norm) > 0.0
    assert names["large_state"].context.sharding.mesh == names["mesh"]


def test_vmapped_seeds_train(names):
    assert names["seed_metrics"].task_loss.shape == (3, 100)
    assert (names["seed_metrics"].task_loss[:, -10:].mean(axis=1) < names["seed_metrics"].task_loss[:, 0]).all()
