"""The learned dynamics model: values by hand, the data of a fit, and learning."""

import functools
import math
from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml3_jax import dynamics, replay
from ml3_jax.dynamics import DynamicsModel, Ensemble, Fitting, make_ensemble
from ml3_jax.replay import ReplayBuffer
from ml3_jax.rollout import Trajectory, rollout
from tests.ml3_jax import toys

SMALL: dict[str, Any] = {"hidden": (8,), "fitting": Fitting(batch_size=16, steps=3)}
ENSEMBLE = make_ensemble(2, 1, **SMALL)  # its fit and its evaluation compile once, for a buffer of 30 rollouts of 4 steps
ONE = make_ensemble(1, 1, hidden=(8,), fitting=Fitting(batch_size=16, steps=3, learning_rate=0.0))
SLOTS, HORIZON = 30, 4
A = jnp.asarray([[1.0, 0.1], [-0.2, 0.9]])
B = jnp.asarray([0.0, 0.5])


def linear(x: jax.Array, action: jax.Array) -> jax.Array:
    return A @ x + B * action


def pendulum(x: jax.Array, action: jax.Array) -> jax.Array:
    """Angle from the bottom (rad) and its velocity (rad/s), damped, driven by a torque; 0.05 s by semi-implicit Euler."""
    q, v = x
    v = v + 0.05 * (-9.8 * jnp.sin(q) - 0.2 * v + 4.0 * action[0])
    return jnp.stack([q + 0.05 * v, v])


@functools.cache
def filled(step_fn: Any, rollouts: int, capacity: int = SLOTS, horizon: int = HORIZON) -> ReplayBuffer:
    """A buffer of rollouts from random starts in [-1, 1]^2 with random actions in [-1, 1]."""

    @jax.jit
    @jax.vmap
    def driven(key: jax.Array) -> Trajectory:
        start_key, key = jax.random.split(key)
        start = jax.random.uniform(start_key, (2,), minval=-1.0, maxval=1.0)
        return rollout(lambda x, k: jax.random.uniform(k, (1,), minval=-1.0), step_fn, start, key, horizon=horizon)

    buffer = replay.make_buffer(capacity, horizon, 2, 1)
    return jax.jit(replay.add)(buffer, driven(jax.random.split(jax.random.key(0), rollouts)))


@functools.cache
def fresh(ensemble: Ensemble) -> DynamicsModel:
    return jax.jit(ensemble.init)(toys.KEY)


@functools.cache
def fitted() -> tuple[DynamicsModel, dynamics.FitMetrics]:
    """`ENSEMBLE` after a fit to 13 rollouts of the pendulum."""
    return ENSEMBLE.fit(fresh(ENSEMBLE), filled(pendulum, 13), toys.KEY)


def constant_model(ensemble: Ensemble, change: list[float]) -> DynamicsModel:
    """A model that predicts the same change everywhere: networks of zeros, denormalised by a mean."""
    model = fresh(ensemble)
    params = jax.tree.map(jnp.zeros_like, model.params)
    return model.replace(params=params, targets=model.targets.replace(mean=jnp.asarray(change)))


def test_gaussian_nll_by_hand():
    # (3 - 1)^2 / 4 + ln 4 + ln 2 pi = 1 + 1.386294 + 1.837877, halved: 2.112086
    # (0 - 2)^2 / 1 + ln 1 + ln 2 pi = 4 + 0 + 1.837877, halved: 2.918939
    mean, variance, target = jnp.asarray([[1.0, 2.0], [4.0, 1.0], [3.0, 0.0]])
    nll = dynamics.gaussian_nll(mean, jnp.log(variance), target)
    np.testing.assert_allclose(nll, 2.112086 + 2.918939, rtol=1e-6)


def test_log_variance_stays_in_its_bounds_and_has_a_gradient_there():
    raw = jnp.asarray([-1e3, -15.0, 0.0, 5.0, 1e3])
    bounded = np.asarray(jax.jit(dynamics.bounded_log_variance)(raw))
    low, high = dynamics.LOG_VARIANCE_BOUNDS
    assert np.all(bounded >= low)
    assert np.all(bounded <= high + 1e-4)
    # high - softplus(high) = 0.5 - ln(1 + e^0.5) = -0.474077; the lower bound adds ln(1 + e^-9.526) = 0.000073
    np.testing.assert_allclose(bounded[2], -0.474004, atol=1e-6)
    assert np.all(np.asarray(jax.jit(jax.vmap(jax.grad(dynamics.bounded_log_variance)))(raw[1:4])) > 0)


def test_a_fit_reports_the_nll_of_its_mini_batches():
    # Two training transitions with changes 1 and 3: normalised targets -1 and 1. Networks of zeros with learning rate 0 predict
    # mean 0 with log-variance l = -0.474004, so every transition costs (e^-l + l + ln 2 pi) / 2.
    model, metrics = ONE.fit(constant_model(ONE, [0.0]), three_rollouts(), toys.KEY)
    expected = (math.exp(0.474004) - 0.474004 + 1.837877) / 2
    np.testing.assert_allclose(metrics.train_nll, expected, rtol=1e-5)
    # The held-out rollout's change is 30, and the model predicts the mean change 2.
    np.testing.assert_allclose(metrics.one_step_error, [28.0], rtol=1e-6)
    np.testing.assert_allclose(ONE.predict(model, jnp.ones(1), jnp.ones(1)), [3.0], rtol=1e-6)


def three_rollouts() -> ReplayBuffer:
    """Room for 30 rollouts of one step; slot 0 goes from 0 to 1, slot 1 (held out) from 10 to 40, slot 2 from 4 to 7."""
    states = jnp.asarray([[0.0, 1.0], [10.0, 40.0], [4.0, 7.0]])[..., None]
    return replay.add(replay.make_buffer(30, 1, 1, 1), Trajectory(states, jnp.ones((3, 1, 1))))


def test_statistics_are_those_of_the_filled_training_slots():
    model, _ = ONE.fit(fresh(ONE), three_rollouts(), toys.KEY)
    # states 0 and 4; an action of always 1, which is centred and not scaled; changes 1 and 3
    np.testing.assert_allclose(model.inputs.mean, [2.0, 1.0])
    np.testing.assert_allclose(model.inputs.std, [2.0, 1.0])
    np.testing.assert_allclose(model.targets.mean, [2.0])
    np.testing.assert_allclose(model.targets.std, [1.0])


def test_a_constant_target_is_predicted_as_constant():
    states = jnp.asarray([[0.0, 0.5], [1.0, 1.5], [2.0, 2.5]])[..., None]
    buffer = replay.add(replay.make_buffer(30, 1, 1, 1), Trajectory(states, jnp.ones((3, 1, 1))))
    model, metrics = ONE.fit(fresh(ONE), buffer, toys.KEY)
    np.testing.assert_allclose(model.targets.std, [dynamics.STD_FLOOR])
    np.testing.assert_allclose(ONE.predict(model, jnp.asarray([7.0]), jnp.asarray([3.0])), [7.5], atol=1e-3)
    chex.assert_tree_all_finite(metrics.train_nll)


def test_velocity_is_integrated_as_by_hand():
    ensemble = make_ensemble(4, 1, predicts="velocity", dt=0.1, **SMALL)
    model = constant_model(ensemble, [0.5, -1.0])
    # v' = (2, 3) + (0.5, -1) = (2.5, 2); q' = (1, -1) + 0.1 v' = (1.25, -0.8)
    predicted = jax.jit(ensemble.predict)(model, jnp.asarray([1.0, -1.0, 2.0, 3.0]), jnp.zeros(1))
    np.testing.assert_allclose(predicted, [1.25, -0.8, 2.5, 2.0], rtol=1e-6)


@functools.cache
def velocity_ensemble() -> Ensemble:
    fitting = Fitting(batch_size=64, steps=1000)
    return make_ensemble(2, 1, predicts="velocity", dt=0.05, hidden=(32,), fitting=fitting)


@functools.cache
def fitted_pendulum(rollouts: int) -> tuple[DynamicsModel, float]:
    """A model of the velocity's change after a fit to the first rollouts, and its error at the end of 40 held-out steps."""
    ensemble = velocity_ensemble()
    everything = filled(pendulum, 40, 40, 40)
    model, _ = ensemble.fit(fresh(ensemble), everything.replace(count=jnp.int32(rollouts)), toys.KEY)
    # All models are judged by the same held-out rollouts.
    return model, float(ensemble.evaluate(model, everything).horizon_error)


def test_velocity_changes_are_the_targets_of_a_fit():
    model, _ = fitted_pendulum(2)  # the second rollout is held out
    changes = np.diff(np.asarray(filled(pendulum, 40, 40, 40).states[0, :, 1]))
    np.testing.assert_allclose(model.targets.mean, [np.mean(changes)], rtol=1e-4)
    np.testing.assert_allclose(model.targets.std, [np.std(changes)], rtol=1e-4)


def test_the_horizon_error_falls_with_data_to_a_third():
    assert fitted_pendulum(40)[1] < fitted_pendulum(2)[1] / 3


def test_limits_clip_the_next_state_and_its_gradient():
    ensemble = make_ensemble(2, 1, state_limits=([-1.0, -np.inf], [1.0, np.inf]), **SMALL)
    model = constant_model(ensemble, [0.5, 0.5])
    x = jnp.asarray([0.9, 3.0])
    np.testing.assert_allclose(ensemble.predict(model, x, jnp.zeros(1)), [1.0, 3.5], rtol=1e-6)
    jacobian = jax.jit(jax.jacobian(ensemble.predict, argnums=1))(model, x, jnp.zeros(1))
    np.testing.assert_array_equal(jacobian, [[0.0, 0.0], [0.0, 1.0]])


def test_members_are_different_networks_and_the_prediction_is_their_mean():
    single = jax.jit(make_ensemble(2, 1, members=1, **SMALL).predict)
    model, _ = fitted()
    x, action = jnp.asarray([0.3, -1.0]), jnp.asarray([0.5])
    alone = [model.replace(params=jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], model.params)) for i in range(3)]
    members = np.asarray([single(member, x, action) for member in alone])
    np.testing.assert_allclose(jax.jit(ENSEMBLE.predict)(model, x, action), members.mean(axis=0), rtol=1e-5)
    assert len(np.unique(members[:, 1])) == 3


def test_members_train_on_different_mini_batches():
    model = fresh(ENSEMBLE)
    same = model.replace(params=jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), model.params))
    after, _ = ENSEMBLE.fit(same, filled(pendulum, 13), toys.KEY)
    kernel = np.asarray(after.params["params"]["Dense_0"]["kernel"])
    assert not np.allclose(kernel[0], kernel[1], atol=1e-6)


def test_held_out_rollouts_and_unfilled_slots_are_never_trained_on():
    buffer = filled(pendulum, 13)
    _, held = replay.split_slots(SLOTS, 0.1)
    unseen = np.asarray([*held, *range(13, SLOTS)])
    spoilt = buffer.replace(
        states=buffer.states.at[unseen].set(jnp.nan),
        actions=buffer.actions.at[unseen].set(jnp.nan),
    )
    on_spoilt, metrics = ENSEMBLE.fit(fresh(ENSEMBLE), spoilt, toys.KEY)
    chex.assert_trees_all_equal(on_spoilt, fitted()[0])
    chex.assert_tree_all_finite(metrics.train_nll)
    # The evaluation does see the NaN.
    assert np.isnan(metrics.horizon_error)
    assert int(metrics.held_out_rollouts) == 2


def test_unfilled_slots_are_not_evaluated():
    buffer, model = filled(pendulum, 13), fresh(ENSEMBLE)
    spoilt = buffer.replace(states=buffer.states.at[13:].set(jnp.nan))
    chex.assert_trees_all_equal(ENSEMBLE.evaluate(model, spoilt), ENSEMBLE.evaluate(model, buffer))


def test_errors_of_a_constant_model_by_hand():
    # The system moves by (1, 2) a step and the model predicts (1.5, 2): open loop, the error of the first coordinate after t
    # steps is 0.5 t, and over both coordinates 0.5 t / sqrt(2).
    steps = jnp.arange(5.0)[:, None] * jnp.asarray([[1.0, 2.0]])
    trajectories = Trajectory(jnp.broadcast_to(steps, (12, 5, 2)), jnp.zeros((12, 4, 1)))
    buffer = replay.add(replay.make_buffer(SLOTS, HORIZON, 2, 1), trajectories)
    errors = ENSEMBLE.evaluate(constant_model(ENSEMBLE, [1.5, 2.0]), buffer)
    np.testing.assert_allclose(errors.one_step_error, [0.5, 0.0], atol=1e-6)
    np.testing.assert_allclose(errors.coordinate_error, [[0.5, 0], [1.0, 0], [1.5, 0], [2.0, 0]], atol=1e-6)
    np.testing.assert_allclose(errors.error_against_time, np.asarray([0.5, 1.0, 1.5, 2.0]) / 2**0.5, rtol=1e-6)
    np.testing.assert_allclose(errors.horizon_error, 2.0 / 2**0.5, rtol=1e-6)
    assert int(errors.held_out_rollouts) == 2


def test_an_empty_buffer_leaves_the_model_unchanged_and_has_no_errors():
    after, metrics = ENSEMBLE.fit(fresh(ENSEMBLE), replay.make_buffer(SLOTS, HORIZON, 2, 1), toys.KEY)
    chex.assert_trees_all_equal(after, fresh(ENSEMBLE))
    assert np.isnan(metrics.train_nll)
    assert np.isnan(metrics.horizon_error)


def test_a_fit_starts_from_the_given_networks_with_zero_log_variance_heads():
    before = fresh(ONE).params["params"]
    after = ONE.fit(fresh(ONE), three_rollouts(), toys.KEY)[0].params["params"]  # learning rate 0
    chex.assert_trees_all_equal(after["Dense_0"], before["Dense_0"])
    for name, leaf in after["Dense_1"].items():
        np.testing.assert_array_equal(leaf[..., :1], before["Dense_1"][name][..., :1])
        np.testing.assert_array_equal(leaf[..., 1:], jnp.zeros_like(leaf[..., 1:]))
        assert np.any(before["Dense_1"][name][..., 1:] != 0)


def test_jit_and_eager_agree():
    ensemble = make_ensemble(1, 1, members=1, hidden=(), fitting=Fitting(batch_size=2, steps=1))
    key = jax.random.key(0, impl="unsafe_rbg")  # one operation; threefry takes hundreds in eager mode
    args = (fresh(ensemble), three_rollouts(), key)
    with jax.disable_jit():
        eager = ensemble.fit(*args)
    chex.assert_trees_all_close(ensemble.fit(*args), eager, rtol=1e-4, atol=1e-6)


def test_vmap_over_seeds_equals_each_seed_alone():
    ensemble = make_ensemble(1, 1, members=2, hidden=(4,), fitting=Fitting(batch_size=2, steps=2))
    keys = jax.random.split(toys.KEY, 2)

    def train(key: jax.Array) -> Any:
        return ensemble.fit(ensemble.init(key), three_rollouts(), key)

    together, train_one = jax.jit(jax.vmap(train))(keys), jax.jit(train)
    for index in range(2):
        one = jax.tree.map(lambda leaf, i=index: leaf[i], together)
        chex.assert_trees_all_close(one, train_one(keys[index]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("predicts", ["state", "velocity"])
def test_derivatives_of_a_prediction_are_finite_differences(x64: None, predicts: str):
    ensemble = make_ensemble(2, 1, predicts=predicts, dt=0.05, **SMALL)
    model = jax.jit(ensemble.init)(toys.KEY)
    model = model.replace(
        inputs=dynamics.Normalizer(jnp.asarray([0.1, 0.2, -0.1]), jnp.asarray([0.5, 2.0, 0.7])),
        targets=jax.tree.map(lambda leaf: leaf + 0.3, model.targets),
    )
    step = 1e-5

    @jax.jit
    def value(point: jax.Array) -> jax.Array:
        return jnp.sum(ensemble.predict(model, point[:2], point[2:]) ** 2)

    def central(fn: Any, point: jax.Array, direction: jax.Array) -> jax.Array:
        return (fn(point + step * direction) - fn(point - step * direction)) / (2 * step)

    point, direction = jnp.asarray([0.4, -1.1, 0.3]), jnp.asarray([0.2, 0.7, -0.5])
    slope = jax.jit(jax.grad(value))
    gradient, curvature = jax.jit(lambda x, dx: jax.jvp(slope, (x,), (dx,)))(point, direction)
    np.testing.assert_allclose(gradient @ direction, central(value, point, direction), rtol=1e-7)
    np.testing.assert_allclose(curvature, central(slope, point, direction), rtol=1e-6, atol=1e-8)
    assert np.all(np.abs(np.asarray(curvature)) > 1e-6)


def test_a_linear_system_is_learned():
    ensemble = make_ensemble(2, 1, hidden=(32,), fitting=Fitting(batch_size=64, steps=1000, learning_rate=3e-3))
    buffer = filled(linear, 20, 20, 20)
    untrained = ensemble.evaluate(fresh(ensemble), buffer)
    _, metrics = ensemble.fit(fresh(ensemble), buffer, toys.KEY)
    # The root mean square of the changes is 0.06 and 0.31.
    assert np.all(np.asarray(metrics.one_step_error) < 0.01)
    assert np.all(np.asarray(untrained.one_step_error) > 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": 0}, "members: expected a whole number of at least 1, got 0"),
        ({"fitting": Fitting(steps=0)}, "steps: expected a whole number of at least 1, got 0"),
        ({"fitting": Fitting(batch_size=0)}, "batch_size: expected a whole number of at least 1, got 0"),
        ({"fitting": Fitting(held_out=0.0)}, "held_out: expected a fraction between 0 and 1"),
        ({"fitting": Fitting(held_out=1.0)}, "held_out: expected a fraction between 0 and 1"),
        ({"predicts": "position"}, "predicts: expected 'state' or 'velocity', got 'position'"),
        ({"predicts": "velocity"}, "dt: expected the seconds of a step"),
        ({"predicts": "velocity", "dt": 0.1, "state_size": 3}, "state_size: expected an even number"),
        ({"state_limits": ([0.0], [1.0])}, r"state_limits: expected \(low, high\), each \[2\]"),
        ({"state_limits": ([0.0, 2.0], [1.0, 1.0])}, "state_limits"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_ensemble(**{"state_size": 2, "action_size": 1, **options})


def test_a_batch_of_states_and_a_buffer_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"expected a state \[2\] and an action \[1\], got \(5, 2\) and \(5, 1\)"):
        ENSEMBLE.predict(fresh(ENSEMBLE), jnp.zeros((5, 2)), jnp.zeros((5, 1)))
    with pytest.raises(ValueError, match="expected states of 2 and actions of 1 coordinates, got 3 and 1"):
        ENSEMBLE.fit(fresh(ENSEMBLE), replay.make_buffer(4, 5, 3, 1), toys.KEY)


def test_the_flat_keywords_of_version_0_2_warn_and_give_the_same_fit():
    with pytest.warns(DeprecationWarning, match=r"fit_steps=\) is called steps=|\) is called fitting=Fitting\(\.\.\.\)"):
        old = cast(Any, make_ensemble)(2, 1, hidden=(8,), batch_size=16, fit_steps=3)
    args = (fresh(ENSEMBLE), filled(pendulum, 13), toys.KEY)
    found, expected = (jax.make_jaxpr(ensemble.fit)(*args) for ensemble in (old, ENSEMBLE))
    assert str(found) == str(expected)
