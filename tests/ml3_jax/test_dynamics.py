"""The learned dynamics model: values by hand, what a fit sees, and that it learns."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml3_jax import dynamics, replay
from ml3_jax.dynamics import DynamicsModel, Ensemble, make_ensemble
from ml3_jax.replay import ReplayBuffer
from ml3_jax.rollout import Trajectory, rollout
from tests.ml3_jax import toys

SMALL: dict[str, Any] = {"hidden": (8,), "batch_size": 16, "fit_steps": 3}
A = jnp.asarray([[1.0, 0.1], [-0.2, 0.9]])
B = jnp.asarray([0.0, 0.5])


def linear(x: jax.Array, action: jax.Array) -> jax.Array:
    return A @ x + B * action


def pendulum(x: jax.Array, action: jax.Array) -> jax.Array:
    """Angle from the bottom (rad) and its velocity (rad/s), damped, driven by a torque; 0.05 s by semi-implicit Euler."""
    q, v = x
    v = v + 0.05 * (-9.8 * jnp.sin(q) - 0.2 * v + 4.0 * action[0])
    return jnp.stack([q + 0.05 * v, v])


def driven(step_fn: Any, rollouts: int, horizon: int = 20, seed: int = 0) -> Trajectory:
    """Rollouts from random starts in [-1, 1]^2 under random actions in [-1, 1]."""

    def one(key: jax.Array) -> Trajectory:
        start_key, key = jax.random.split(key)
        start = jax.random.uniform(start_key, (2,), minval=-1.0, maxval=1.0)
        return rollout(lambda x, k: jax.random.uniform(k, (1,), minval=-1.0), step_fn, start, key, horizon=horizon)

    return jax.vmap(one)(jax.random.split(jax.random.key(seed), rollouts))


def filled(step_fn: Any, rollouts: int, capacity: int, horizon: int = 20) -> ReplayBuffer:
    return replay.add(replay.make_buffer(capacity, horizon, 2, 1), driven(step_fn, rollouts, horizon))


def constant_model(ensemble: Ensemble, change: list[float]) -> DynamicsModel:
    """A model that predicts the same change everywhere: networks of zeros, denormalised by a mean."""
    model = ensemble.init(toys.KEY)
    params = jax.tree.map(jnp.zeros_like, model.params)
    return model.replace(params=params, targets=model.targets.replace(mean=jnp.asarray(change)))


def assert_trees_equal(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_gaussian_nll_by_hand():
    # (3 - 1)^2 / 4 + ln 4 + ln 2 pi = 1 + 1.386294 + 1.837877, halved: 2.112086
    # (0 - 2)^2 / 1 + ln 1 + ln 2 pi = 4 + 0 + 1.837877, halved: 2.918939
    mean, variance, target = jnp.asarray([[1.0, 2.0], [4.0, 1.0], [3.0, 0.0]])
    nll = dynamics.gaussian_nll(mean, jnp.log(variance), target)
    np.testing.assert_allclose(nll, 2.112086 + 2.918939, rtol=1e-6)


def test_log_variance_stays_in_its_bounds_and_a_gradient_leads_back():
    raw = jnp.asarray([-1e3, -15.0, 0.0, 5.0, 1e3])
    bounded = np.asarray(dynamics.bounded_log_variance(raw))
    low, high = dynamics.LOG_VARIANCE_BOUNDS
    assert np.all(bounded >= low)
    assert np.all(bounded <= high + 1e-4)
    # high - softplus(high) = 0.5 - ln(1 + e^0.5) = -0.474077; the lower bound adds ln(1 + e^-9.526) = 0.000073
    np.testing.assert_allclose(bounded[2], -0.474004, atol=1e-6)
    assert np.all(np.asarray(jax.vmap(jax.grad(dynamics.bounded_log_variance))(raw[1:4])) > 0)


def test_a_fit_reports_the_nll_of_its_mini_batches():
    # Two training transitions with changes 1 and 3: normalised targets -1 and 1. Networks of zeros, not moved, predict mean 0
    # with log-variance l = -0.474004, so that every transition costs (e^-l + l + ln 2 pi) / 2.
    ensemble = make_ensemble(1, 1, learning_rate=0.0, **SMALL)
    model, metrics = ensemble.fit(constant_model(ensemble, [0.0]), three_rollouts(), toys.KEY)
    expected = (math.exp(0.474004) - 0.474004 + 1.837877) / 2
    np.testing.assert_allclose(metrics.train_nll, expected, rtol=1e-5)
    # The held-out rollout's change is 30, and the model predicts the mean change 2.
    np.testing.assert_allclose(metrics.one_step_error, [28.0], rtol=1e-6)
    np.testing.assert_allclose(ensemble.predict(model, jnp.ones(1), jnp.ones(1)), [3.0], rtol=1e-6)


def three_rollouts() -> ReplayBuffer:
    """Room for 30 rollouts of one step; slot 0 goes from 0 to 1, slot 1 (held out) from 10 to 40, slot 2 from 4 to 7."""
    states = jnp.asarray([[0.0, 1.0], [10.0, 40.0], [4.0, 7.0]])[..., None]
    return replay.add(replay.make_buffer(30, 1, 1, 1), Trajectory(states, jnp.ones((3, 1, 1))))


def test_statistics_are_those_of_the_filled_training_slots():
    ensemble = make_ensemble(1, 1, **SMALL)
    model, _ = ensemble.fit(ensemble.init(toys.KEY), three_rollouts(), toys.KEY)
    # states 0 and 4; an action of always 1, which is only centred; changes 1 and 3
    np.testing.assert_allclose(model.inputs.mean, [2.0, 1.0])
    np.testing.assert_allclose(model.inputs.std, [2.0, 1.0])
    np.testing.assert_allclose(model.targets.mean, [2.0])
    np.testing.assert_allclose(model.targets.std, [1.0])


def test_a_target_that_does_not_vary_is_predicted_as_constant():
    states = jnp.asarray([[0.0, 0.5], [1.0, 1.5], [2.0, 2.5]])[..., None]
    buffer = replay.add(replay.make_buffer(3, 1, 1, 1), Trajectory(states, jnp.ones((3, 1, 1))))
    ensemble = make_ensemble(1, 1, **SMALL)
    model, metrics = ensemble.fit(ensemble.init(toys.KEY), buffer, toys.KEY)
    np.testing.assert_allclose(model.targets.std, [dynamics.STD_FLOOR])
    np.testing.assert_allclose(ensemble.predict(model, jnp.asarray([7.0]), jnp.asarray([3.0])), [7.5], atol=1e-3)
    assert np.isfinite(metrics.train_nll)


def test_velocity_is_integrated_as_by_hand():
    ensemble = make_ensemble(4, 1, predicts="velocity", dt=0.1, **SMALL)
    model = constant_model(ensemble, [0.5, -1.0])
    # v' = (2, 3) + (0.5, -1) = (2.5, 2); q' = (1, -1) + 0.1 v' = (1.25, -0.8)
    predicted = ensemble.predict(model, jnp.asarray([1.0, -1.0, 2.0, 3.0]), jnp.zeros(1))
    np.testing.assert_allclose(predicted, [1.25, -0.8, 2.5, 2.0], rtol=1e-6)


def test_velocity_changes_are_what_a_fit_learns():
    ensemble = make_ensemble(2, 1, predicts="velocity", dt=0.05, **SMALL)
    buffer = filled(pendulum, 2, 10)
    model, _ = ensemble.fit(ensemble.init(toys.KEY), buffer, toys.KEY)
    v = np.asarray(buffer.states[0, :, 1])
    np.testing.assert_allclose(model.targets.mean, [np.mean(np.diff(v))], rtol=1e-4)
    np.testing.assert_allclose(model.targets.std, [np.std(np.diff(v))], rtol=1e-4)


def test_limits_clip_the_next_state_and_its_gradient():
    ensemble = make_ensemble(2, 1, state_limits=([-1.0, -np.inf], [1.0, np.inf]), **SMALL)
    model = constant_model(ensemble, [0.5, 0.5])
    x = jnp.asarray([0.9, 3.0])
    np.testing.assert_allclose(ensemble.predict(model, x, jnp.zeros(1)), [1.0, 3.5], rtol=1e-6)
    np.testing.assert_array_equal(ensemble.predict_members(model, x, jnp.zeros(1)), jnp.tile(jnp.asarray([1.0, 3.5]), (3, 1)))
    jacobian = jax.jacobian(ensemble.predict, argnums=1)(model, x, jnp.zeros(1))
    np.testing.assert_array_equal(jacobian, [[0.0, 0.0], [0.0, 1.0]])


def test_members_are_networks_of_their_own_and_the_prediction_is_their_mean():
    ensemble, single = make_ensemble(2, 1, **SMALL), make_ensemble(2, 1, members=1, **SMALL)
    model, _ = ensemble.fit(ensemble.init(toys.KEY), filled(pendulum, 4, 10), toys.KEY)
    x, action = jnp.asarray([0.3, -1.0]), jnp.asarray([0.5])
    members = ensemble.predict_members(model, x, action)
    for index in range(3):
        alone = model.replace(params=jax.tree.map(lambda leaf, i=index: leaf[i : i + 1], model.params))
        np.testing.assert_allclose(members[index], single.predict(alone, x, action), rtol=1e-5)
    np.testing.assert_allclose(ensemble.predict(model, x, action), jnp.mean(members, axis=0), rtol=1e-5)
    assert len({float(member[1]) for member in members}) == 3


def test_members_train_on_mini_batches_of_their_own():
    ensemble = make_ensemble(2, 1, **SMALL)
    model = ensemble.init(toys.KEY)
    same = model.replace(params=jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), model.params))
    fitted, _ = ensemble.fit(same, filled(pendulum, 4, 10), toys.KEY)
    kernel = np.asarray(fitted.params["params"]["Dense_0"]["kernel"])
    assert not np.allclose(kernel[0], kernel[1], atol=1e-6)


def test_a_held_out_rollout_and_an_unfilled_slot_are_never_trained_on():
    ensemble = make_ensemble(2, 1, **SMALL)
    buffer, model = filled(pendulum, 13, 30), ensemble.init(toys.KEY)
    _, held = replay.split_slots(30, 0.1)
    unseen = np.asarray([*held, *range(13, 30)])
    spoilt = buffer.replace(
        states=buffer.states.at[unseen].set(jnp.nan),
        actions=buffer.actions.at[unseen].set(jnp.nan),
    )
    fitted, _ = ensemble.fit(model, buffer, toys.KEY)
    fitted_on_spoilt, metrics = ensemble.fit(model, spoilt, toys.KEY)
    assert_trees_equal(fitted_on_spoilt, fitted)
    assert np.isfinite(metrics.train_nll)
    # and the perturbation is seen where it should be
    assert np.isnan(metrics.horizon_error)
    assert int(metrics.held_out_rollouts) == 2


def test_unfilled_slots_are_no_held_out_rollouts():
    ensemble = make_ensemble(2, 1, **SMALL)
    buffer, model = filled(pendulum, 13, 30), ensemble.init(toys.KEY)
    spoilt = buffer.replace(states=buffer.states.at[13:].set(jnp.nan))
    assert_trees_equal(ensemble.evaluate(model, spoilt), ensemble.evaluate(model, buffer))


def test_errors_of_a_constant_model_by_hand():
    # The system moves by (1, 2) a step and the model says (1.5, 2): open loop, the error of the first coordinate after t
    # steps is 0.5 t, and over both coordinates 0.5 t / sqrt(2).
    ensemble = make_ensemble(2, 1, **SMALL)
    steps = jnp.arange(5.0)[:, None] * jnp.asarray([[1.0, 2.0]])
    trajectories = Trajectory(jnp.broadcast_to(steps, (12, 5, 2)), jnp.zeros((12, 4, 1)))
    buffer = replay.add(replay.make_buffer(20, 4, 2, 1), trajectories)
    errors = ensemble.evaluate(constant_model(ensemble, [1.5, 2.0]), buffer)
    np.testing.assert_allclose(errors.one_step_error, [0.5, 0.0], atol=1e-6)
    np.testing.assert_allclose(errors.coordinate_error, [[0.5, 0], [1.0, 0], [1.5, 0], [2.0, 0]], atol=1e-6)
    np.testing.assert_allclose(errors.error_against_time, np.asarray([0.5, 1.0, 1.5, 2.0]) / 2**0.5, rtol=1e-6)
    np.testing.assert_allclose(errors.horizon_error, 2.0 / 2**0.5, rtol=1e-6)
    assert int(errors.held_out_rollouts) == 2


def test_an_empty_buffer_leaves_the_model_and_has_no_errors():
    ensemble = make_ensemble(2, 1, **SMALL)
    model = ensemble.init(toys.KEY)
    fitted, metrics = ensemble.fit(model, replay.make_buffer(10, 20, 2, 1), toys.KEY)
    assert_trees_equal(fitted, model)
    assert np.isnan(metrics.train_nll)
    assert np.isnan(metrics.horizon_error)


def test_a_fit_goes_on_from_the_networks_but_not_from_their_variances():
    ensemble = make_ensemble(2, 1, learning_rate=0.0, **SMALL)
    model, buffer = ensemble.init(toys.KEY), filled(pendulum, 4, 10)
    last = model.params["params"]["Dense_1"]
    fitted, _ = ensemble.fit(model, buffer, toys.KEY)
    assert_trees_equal(fitted.params["params"]["Dense_0"], model.params["params"]["Dense_0"])
    for name in ("kernel", "bias"):
        after = fitted.params["params"]["Dense_1"][name]
        np.testing.assert_array_equal(after[..., :2], last[name][..., :2])
        np.testing.assert_array_equal(after[..., 2:], jnp.zeros_like(last[name][..., 2:]))


def test_jit_and_eager_agree():
    ensemble = make_ensemble(2, 1, members=2, hidden=(8,), batch_size=8, fit_steps=2)
    model, buffer = ensemble.init(toys.KEY), filled(pendulum, 2, 2, horizon=2)
    key = jax.random.key(0, impl="unsafe_rbg")  # draws in one operation, where threefry takes hundreds of eager ones
    with jax.disable_jit():
        eager = ensemble.fit(model, buffer, key)
    compiled = ensemble.fit(model, buffer, key)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), compiled, eager)


def test_vmap_over_seeds_is_each_seed_alone():
    ensemble = make_ensemble(2, 1, **SMALL)
    buffer, keys = filled(pendulum, 4, 6, horizon=4), jax.random.split(toys.KEY, 2)

    def train(key: jax.Array) -> Any:
        return ensemble.fit(ensemble.init(key), buffer, key)

    together = jax.vmap(train)(keys)
    for index in range(2):
        alone = train(keys[index])
        jax.tree.map(
            lambda x, y, i=index: np.testing.assert_allclose(x[i], y, rtol=1e-4, atol=1e-6),
            together,
            alone,
        )


@pytest.mark.parametrize("predicts", ["state", "velocity"])
def test_derivatives_of_a_prediction_are_finite_differences(x64: None, predicts: str):
    ensemble = make_ensemble(2, 1, predicts=predicts, dt=0.05, **SMALL)
    model = ensemble.init(toys.KEY)
    model = model.replace(
        inputs=dynamics.Normalizer(jnp.asarray([0.1, 0.2, -0.1]), jnp.asarray([0.5, 2.0, 0.7])),
        targets=jax.tree.map(lambda leaf: leaf + 0.3, model.targets),
    )
    step = 1e-5

    def value(point: jax.Array) -> jax.Array:
        return jnp.sum(ensemble.predict(model, point[:2], point[2:]) ** 2)

    def central(fn: Any, point: jax.Array, direction: jax.Array) -> jax.Array:
        return (fn(point + step * direction) - fn(point - step * direction)) / (2 * step)

    point, direction = jnp.asarray([0.4, -1.1, 0.3]), jnp.asarray([0.2, 0.7, -0.5])
    gradient, curvature = jax.jvp(jax.grad(value), (point,), (direction,))
    np.testing.assert_allclose(gradient @ direction, central(value, point, direction), rtol=1e-7)
    np.testing.assert_allclose(curvature, central(jax.grad(value), point, direction), rtol=1e-6, atol=1e-8)
    assert np.all(np.abs(np.asarray(curvature)) > 1e-6)


def test_a_linear_system_is_learned():
    ensemble = make_ensemble(2, 1, hidden=(32,), batch_size=64, fit_steps=1000, learning_rate=3e-3)
    buffer = filled(linear, 20, 20)
    untrained = ensemble.evaluate(ensemble.init(toys.KEY), buffer)
    _, metrics = ensemble.fit(ensemble.init(toys.KEY), buffer, toys.KEY)
    # Changes are about 0.3 in each coordinate.
    assert np.all(np.asarray(metrics.one_step_error) < 0.01)
    assert np.all(np.asarray(untrained.one_step_error) > 0.1)


def test_the_horizon_error_falls_with_data_to_a_third():
    ensemble = make_ensemble(2, 1, predicts="velocity", dt=0.05, hidden=(32,), batch_size=64, fit_steps=1000)
    everything = filled(pendulum, 40, 40)
    horizon_errors = {}
    for rollouts in (2, 40):
        buffer = everything.replace(count=jnp.int32(rollouts))
        model, _ = ensemble.fit(ensemble.init(toys.KEY), buffer, toys.KEY)
        # Both models are judged by the same held-out rollouts.
        horizon_errors[rollouts] = float(ensemble.evaluate(model, everything).horizon_error)
    assert horizon_errors[40] < horizon_errors[2] / 3


def test_features_of_an_angle_make_a_turn_no_difference():
    def turned(x: jax.Array) -> jax.Array:
        return jnp.stack([jnp.sin(x[0]), jnp.cos(x[0]), x[1]])

    ensemble = make_ensemble(2, 1, features_fn=turned, **SMALL)
    model, _ = ensemble.fit(ensemble.init(toys.KEY), filled(pendulum, 4, 6), toys.KEY)
    assert model.inputs.mean.shape == (4,)
    x, turn = jnp.asarray([0.3, -1.0]), jnp.asarray([2 * math.pi, 0.0])
    action = jnp.asarray([0.5])
    np.testing.assert_allclose(ensemble.predict(model, x + turn, action), ensemble.predict(model, x, action) + turn, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": 0}, "members: expected at least 1, got 0"),
        ({"fit_steps": 0}, "fit_steps: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"held_out": 0.0}, "held_out: expected a fraction between 0 and 1"),
        ({"held_out": 1.0}, "held_out: expected a fraction between 0 and 1"),
        ({"activation": "tan"}, "activation: expected one of"),
        ({"predicts": "position"}, "predicts: expected 'state' or 'velocity', got 'position'"),
        ({"predicts": "velocity"}, "dt: expected the seconds of a step"),
        ({"predicts": "velocity", "dt": 0.1, "state_size": 3}, "state_size: expected an even number"),
        ({"state_limits": ([0.0], [1.0])}, r"state_limits: expected \(low, high\), each \[2\]"),
        ({"state_limits": ([0.0, 2.0], [1.0, 1.0])}, "state_limits"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_ensemble(**{"state_size": 2, "action_size": 1, **options})


def test_a_batch_of_states_and_a_foreign_buffer_are_refused():
    ensemble = make_ensemble(2, 1, **SMALL)
    model = ensemble.init(toys.KEY)
    with pytest.raises(ValueError, match=r"expected a state \[2\] and an action \[1\], got \(5, 2\) and \(5, 1\)"):
        ensemble.predict(model, jnp.zeros((5, 2)), jnp.zeros((5, 1)))
    with pytest.raises(ValueError, match="expected states of 2 and actions of 1 coordinates, got 3 and 1"):
        ensemble.fit(model, replay.make_buffer(4, 5, 3, 1), toys.KEY)
