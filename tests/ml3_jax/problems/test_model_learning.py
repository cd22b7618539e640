"""The context of model-based problems: the first rollouts, refits and their log, and rollouts with NaN or inf."""

import functools
import re
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml3_jax import dynamics
from ml3_jax.problems import model_learning
from ml3_jax.problems.model_learning import LOGGED_FITS, ModelContext
from ml3_jax.rollout import Trajectory
from tests.ml3_jax import toys

HORIZON = 3
LIMIT = 2.0
ENSEMBLE = dynamics.make_ensemble(2, 1, members=2, hidden=(4,), fitting=dynamics.Fitting(batch_size=8, steps=3))


class Tank(NamedTuple):
    """State of `Tanks`."""

    obs: jax.Array  # [2]
    goal: jax.Array  # [3]
    steps: jax.Array  # [] int32, taken


class Tanks:
    """Two tanks in a row: x' = (0.5 x0 + u, 0.5 x1 + 0.5 x0); its state is NaN after step `breaks_at`."""

    name = "tanks"
    observation_size = 2
    action_size = 1
    action_limit = LIMIT

    def __init__(self, breaks_at: int = -1):
        self.breaks_at = breaks_at

    def state_at(self, x: jax.Array, goal: jax.Array) -> Tank:
        assert goal.shape == (3,)
        return Tank(x, goal, jnp.int32(0))

    def step(self, state: Tank, action: jax.Array) -> Tank:
        steps = state.steps + 1
        x = jnp.stack([0.5 * state.obs[0] + action[0], 0.5 * state.obs[1] + 0.5 * state.obs[0]])
        return Tank(jnp.where(steps == self.breaks_at, jnp.nan, x), state.goal, steps)


def sample_start(key: jax.Array) -> jax.Array:
    return jax.random.uniform(key, (2,), minval=-1.0)


def initial(system: Tanks | None = None, key: jax.Array = toys.KEY, **sizes: int) -> ModelContext:
    settings = {"horizon": HORIZON, "rollouts": 4, "capacity": 8, **sizes}
    return model_learning.initial_context(system or Tanks(), ENSEMBLE, sample_start, 3, key, **settings)


@functools.cache
def sound() -> ModelContext:
    """The first context of tanks without NaN."""
    return initial()


def constant(level: float, rollouts: int = 2) -> Trajectory:
    """Rollouts of constant states and actions."""
    return Trajectory(jnp.full((rollouts, HORIZON + 1, 2), level), jnp.full((rollouts, HORIZON, 1), level))


def followed(states: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """The states of the tanks from the first state under the actions: [..., T + 1, 2]."""
    x, made = states[..., 0, :], [states[..., 0, :]]
    for step in range(actions.shape[-2]):
        x = np.stack([0.5 * x[..., 0] + actions[..., step, 0], 0.5 * x[..., 1] + 0.5 * x[..., 0]], axis=-1)
        made.append(x)
    return np.stack(made, axis=-2)


def test_a_real_rollout_records_clipped_actions_in_units_of_the_system():
    # a = 2, -0.25 - x0 / 8 in units of the limit: clipped at first
    def act(x: jax.Array, key: jax.Array) -> jax.Array:
        del key
        return jnp.where(x[:1] == 0.0, 2.0, -0.25 - x[:1] / 8)

    found = model_learning.real_rollout(Tanks(), act, jnp.zeros(2), jnp.zeros(3), toys.KEY, horizon=3)
    # u0 = 2 -> (2, 0); u1 = 2 (-0.25 - 0.25) = -1 -> (0, 1), and the action is clipped again: u2 = 2 -> (2, 0.5)
    np.testing.assert_allclose(found.actions, [[2.0], [-1.0], [2.0]])
    np.testing.assert_allclose(found.states, [[0.0, 0.0], [2.0, 0.0], [0.0, 1.0], [2.0, 0.5]])


def test_random_actions_have_standard_deviation_1_at_every_step_and_persist():
    keys = jax.random.split(toys.KEY, 4000)
    actions = np.asarray(jax.jit(jax.vmap(lambda key: model_learning.random_actions(key, 6, 2)))(keys))
    assert actions.shape == (4000, 6, 2)
    # standard error of a standard deviation: 1 / sqrt(2 * 4000) = 0.011
    np.testing.assert_allclose(actions.std(axis=0), 1.0, atol=0.05)
    now, following = actions[:, :-1].ravel(), actions[:, 1:].ravel()
    np.testing.assert_allclose(np.mean(now * following), model_learning.NOISE_MEMORY, atol=0.05)


def test_the_first_context_holds_rollouts_of_the_system_and_no_fit():
    context = sound()
    states, actions = np.asarray(context.buffer.states), np.asarray(context.buffer.actions)
    assert (int(context.buffer.count), int(context.buffer.position)) == (4, 4)
    np.testing.assert_allclose(states[:4], followed(states[:4], actions[:4]), rtol=1e-6, atol=1e-6)
    assert not states[4:].any()
    assert np.abs(actions).max() <= LIMIT
    assert np.ptp(states[:4, 0], axis=0).min() > 0  # every rollout has its own start
    assert np.ptp(actions[:4, 0]) > 0
    log = context.log
    assert int(log.fits) == 0
    assert all(np.isnan(x).all() for x in (log.one_step_error, log.horizon_error, log.error_against_time))
    assert {name: values.shape for name, values in model_learning.learning_curve(log).items()} == {
        "rollouts": (0,),
        "one_step_error": (0, 2),
        "horizon_error": (0, 2),
    }


def test_the_same_key_gives_the_same_bytes_and_another_key_other_rollouts():
    context = sound()
    toys.assert_same(context, initial())
    other = initial(key=jax.random.key(8))
    assert np.all(np.asarray(context.buffer.states[:4, 0]) != np.asarray(other.buffer.states[:4, 0]))
    key = jax.random.key(3)
    toys.assert_same(
        model_learning.refit(ENSEMBLE, context, constant(1.0), key), model_learning.refit(ENSEMBLE, context, constant(1.0), key)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollouts": 0}, "rollouts: expected a whole number of at least 1, got 0"),
        ({"rollouts": 9}, "capacity_rollouts: expected at least 9, the rollouts of one refresh, got 8"),
        ({"rollouts_per_refresh": 9}, "capacity_rollouts: expected at least 9, the rollouts of one refresh, got 8"),
        ({"capacity": 0}, "capacity_rollouts: expected a whole number of at least 1, got 0"),
        ({"horizon": 0}, "horizon: expected a whole number of at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        initial(None, toys.KEY, **options)


@pytest.mark.parametrize("breaks_at", [1, HORIZON])
def test_the_error_of_a_state_that_is_not_finite_names_system_step_and_state_before_it(breaks_at: int):
    unbroken = sound().buffer  # the same rollouts
    with pytest.raises(ValueError, match="not finite") as caught:
        initial(Tanks(breaks_at))
    words = r"tanks: rollout 0: the state of step (\d) is not finite, \[nan nan\]; before it the state was \[(.*)\] and the "
    found = re.match(words + r"action \[(.*)\]: ", str(caught.value))
    assert found is not None
    assert int(found[1]) == breaks_at
    np.testing.assert_allclose([float(x) for x in found[2].split()], unbroken.states[0, breaks_at - 1], rtol=1e-5)
    np.testing.assert_allclose([float(x) for x in found[3].split()], unbroken.actions[0, breaks_at - 1], rtol=1e-5)


def test_the_error_of_a_start_that_is_not_finite_names_the_start():
    def nowhere(key: jax.Array) -> jax.Array:
        return sample_start(key) / 0.0

    with pytest.raises(ValueError, match="tanks: rollout 0: the state it starts from is not finite"):
        model_learning.initial_context(Tanks(), ENSEMBLE, nowhere, 3, toys.KEY, horizon=3, rollouts=1, capacity=2)


def test_a_refit_adds_the_rollouts_fits_the_model_and_logs_its_errors():
    context = sound()
    after = model_learning.refit(ENSEMBLE, context, constant(0.5), jax.random.key(1))
    assert int(after.buffer.count) == 6
    toys.assert_same(after.buffer.states[4:6], constant(0.5).states)
    toys.assert_same(after.buffer.actions[4:6], constant(0.5).actions)
    toys.assert_same(after.buffer.states[:4], context.buffer.states[:4])
    fitted, metrics = ENSEMBLE.fit(context.model, after.buffer, jax.random.key(1))
    toys.assert_same(after.model, fitted)
    assert np.abs(toys.flat(fitted) - toys.flat(context.model)).max() > 1e-3
    assert int(after.log.fits) == 1
    assert int(after.log.rollouts[0]) == 6
    toys.assert_same(after.log.one_step_error[0], metrics.one_step_error)
    toys.assert_same(after.log.horizon_error[0], metrics.coordinate_error[HORIZON - 1])
    toys.assert_same(after.log.error_against_time, metrics.coordinate_error)
    assert np.isfinite(after.log.error_against_time).all()
    assert np.isnan(after.log.one_step_error[1:]).all()


def test_the_learning_curve_has_one_entry_per_fit():
    context = sound()
    for level in (0.1, 0.2, 0.3):
        context = model_learning.refit(ENSEMBLE, context, constant(level), jax.random.key(1))
    curve = model_learning.learning_curve(context.log)
    np.testing.assert_array_equal(curve["rollouts"], [6, 8, 8])  # the buffer holds 8
    assert curve["one_step_error"].shape == curve["horizon_error"].shape == (3, 2)
    assert np.isfinite(curve["one_step_error"]).all()
    assert np.isfinite(curve["horizon_error"]).all()


def test_fits_beyond_the_last_entry_are_counted_and_not_logged():
    context = sound()
    context = context.replace(log=context.log.replace(fits=jnp.int32(LOGGED_FITS - 1)))
    last = model_learning.refit(ENSEMBLE, context, constant(0.5), jax.random.key(1))
    assert np.isfinite(last.log.one_step_error[-1]).all()
    beyond = model_learning.refit(ENSEMBLE, last, constant(-0.5), jax.random.key(2))
    assert int(beyond.log.fits) == LOGGED_FITS + 1
    for name in ("rollouts", "one_step_error", "horizon_error"):
        toys.assert_same(getattr(beyond.log, name), getattr(last.log, name))
    # error_against_time is still of the latest fit.
    toys.assert_same(beyond.log.error_against_time, ENSEMBLE.evaluate(beyond.model, beyond.buffer).coordinate_error)
    assert np.any(np.asarray(beyond.log.error_against_time) != np.asarray(last.log.error_against_time))
    assert all(len(values) == LOGGED_FITS for values in model_learning.learning_curve(beyond.log).values())


@pytest.mark.parametrize(("where", "bad"), [("states", np.nan), ("actions", np.inf)])
def test_a_known_rollout_replaces_one_that_is_not_finite(where: str, bad: float):
    context = sound()
    good = constant(0.5, rollouts=3)
    broken = good.replace(**{where: getattr(good, where).at[1, -1, 0].set(bad)})
    after = model_learning.refit(ENSEMBLE, context, broken, jax.random.key(1))
    assert int(after.buffer.count) == 7
    toys.assert_same(after.buffer.states[5], context.buffer.states[0])
    toys.assert_same(after.buffer.actions[5], context.buffer.actions[0])
    for slot in (4, 6):
        toys.assert_same(after.buffer.states[slot], good.states[0])
    chex.assert_tree_all_finite((after.model, after.buffer, after.log.horizon_error[0]))


def test_predictions_are_of_the_model_in_the_context():
    context = sound()
    fitted = model_learning.refit(ENSEMBLE, context, constant(0.5), jax.random.key(1))
    predict, x, action = model_learning.predict_fn(ENSEMBLE), jnp.asarray([0.3, -0.2]), jnp.asarray([1.5])
    for one in (context, fitted):
        toys.assert_same(predict(one, x, action), ENSEMBLE.predict(one.model, x, action))
    assert np.any(np.asarray(predict(context, x, action)) != np.asarray(predict(fitted, x, action)))
