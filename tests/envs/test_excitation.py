"""Motions against finite differences and the arms' limits, the noise of measuring them, and what is refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs import arm as arms
from envs import excitation, rigid_body
from envs.excitation import Noise, Trajectory
from envs.rigid_body import Arm

M, T, DT = 4, 200, 0.1


def draw(key: jax.Array, arm: Arm, **options: Any) -> Trajectory:
    return excitation.sample_trajectory(key, arm, **({"steps": T, "dt": DT} | options))


def carrying(arm: Arm, mass: float) -> Arm:
    return rigid_body.with_load(arm, mass, jnp.array([0.03, -0.03, 0.08]))


# Of many keys, and of many states; compiled once an arm, since loads are arguments.
motions = jax.jit(jax.vmap(draw, in_axes=(0, None)))
torques = jax.jit(jax.vmap(rigid_body.inverse_dynamics, in_axes=(None, 0, 0, 0)))


@pytest.mark.parametrize(("name", "mass"), [("sawyer", 0.0), ("sawyer", 5.0), ("reacher", 1.0)])
def test_motions_keep_the_limits_and_move_every_joint(name: str, mass: float):
    arm = carrying(arms.load(name), mass)
    trajectory = motions(jax.random.split(jax.random.key(0), M), arm)
    used = jnp.abs(torques(arm, *(x.reshape(-1, arm.size) for x in trajectory))) / arm.torque_limit
    assert used.max() <= 0.95 + 1e-4
    assert (jnp.abs(trajectory.v) <= arm.velocity_limit).all()
    assert ((trajectory.q >= arm.lower) & (trajectory.q <= arm.upper)).all()
    assert trajectory.v.std(axis=1).min() > 0.02
    for i in range(M):
        excitation.check_trajectory(arm, jax.tree.map(lambda x, i=i: x[i], trajectory))


def test_a_load_shrinks_motions_only_where_it_must():
    arm, keys = arms.load("sawyer"), jax.random.split(jax.random.key(1), M)
    light, heavy = motions(keys, arm), motions(keys, carrying(arm, 5.0))
    ratio = heavy.v.std(axis=(1, 2)) / light.v.std(axis=(1, 2))
    assert ratio.min() < 0.9
    assert ratio.max() <= 1.0 + 1e-6
    strong = dataclasses.replace(carrying(arm, 5.0), torque_limit=jnp.inf * arm.torque_limit)
    np.testing.assert_allclose(motions(keys, strong).q, light.q, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_derivatives_are_exact():
    dt = 1e-4
    arm = carrying(arms.load("reacher"), 2.0)
    q, v, a = jax.jit(lambda key: draw(key, arm, steps=500, dt=dt))(jax.random.key(2))
    # Central differences err by dt^2 / 6 times the third derivative, here below 1e2.
    np.testing.assert_allclose((q[2:] - q[:-2]) / (2 * dt), v[1:-1], atol=1e-6)
    np.testing.assert_allclose((v[2:] - v[:-2]) / (2 * dt), a[1:-1], atol=1e-6)


def test_motions_do_not_repeat():
    q = jax.jit(lambda key: draw(key, arms.load("reacher"), steps=4000, harmonics=3))(jax.random.key(3)).q
    start = q[:200] - q[:200].mean(axis=0)
    for shift in range(400, 3800, 50):
        again = q[shift : shift + 200]
        assert jnp.abs(again - again.mean(axis=0) - start).max() > 0.05


def test_vmap_and_jit_are_one_eager_call_and_keys_differ():
    arm, keys = carrying(arms.load("sawyer"), 3.0), jax.random.split(jax.random.key(4), M)
    together, alone = motions(keys, arm), draw(keys[1], arm)
    for one, many in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, many[1], atol=1e-4)
    assert jnp.abs(together.q[0] - together.q[1]).max() > 0.1


def test_joints_without_limits_move_about_home():
    arm = arms.load("reacher")
    free = dataclasses.replace(arm, lower=jnp.inf * arm.lower, upper=jnp.inf * arm.upper, home=jnp.array([5.0, -5.0]))
    q = motions(jax.random.split(jax.random.key(5), M), free).q
    assert (jnp.abs(q - free.home) < np.pi).all()
    assert q.std(axis=1).min() > 0.1


def test_an_arm_that_cannot_hold_its_load_rests_and_is_refused():
    arm = carrying(arms.load("sawyer"), 100.0)
    trajectory = jax.tree.map(lambda x: x[0], motions(jax.random.split(jax.random.key(6), M), arm))
    np.testing.assert_array_equal(trajectory.q, jnp.tile(arm.home, (T, 1)))
    with pytest.raises(ValueError, match=r"torque: expected joint right_j\d within"):
        excitation.check_trajectory(arm, trajectory)
    with pytest.raises(ValueError, match="got an arm at rest"):
        excitation.check_trajectory(arms.load("sawyer"), trajectory)


def test_noise_has_the_given_size():
    clean = Trajectory(*(jnp.zeros((1000, 3)) for _ in range(3)))
    noise = Noise(q=0.1, v=0.0, a=jnp.array([1.0, 2.0, 3.0]), torque=0.5)
    measured, torque = excitation.measure(jax.random.key(7), clean, jnp.ones((1000, 3)), noise)
    np.testing.assert_allclose(measured.q.std(axis=0), 0.1, rtol=0.15)
    np.testing.assert_array_equal(measured.v, 0.0)
    np.testing.assert_allclose(measured.a.std(axis=0), [1.0, 2.0, 3.0], rtol=0.15)
    np.testing.assert_allclose(torque.std(axis=0), 0.5, rtol=0.15)
    np.testing.assert_allclose(torque.mean(axis=0), 1.0, atol=0.05)
    assert jnp.abs(jnp.mean(measured.q * (torque - 1))) < 0.008
    with pytest.raises(ValueError, match=r"torque: expected shape \(1000, 3\)"):
        excitation.measure(jax.random.key(7), clean, jnp.ones((1000, 2)), noise)


def test_measurements_that_are_not_finite_are_named():
    arm = arms.load("reacher")
    clean = Trajectory(*(jnp.zeros((T, 2)) for _ in range(3)))
    excitation.check_measured(arm, clean, jnp.zeros((T, 2)))
    with pytest.raises(ValueError, match=r"measured torque: .* got inf at sample 5 of joint elbow and 1 more"):
        excitation.check_measured(arm, clean, jnp.zeros((T, 2)).at[5:7, 1].set(jnp.inf))
    with pytest.raises(ValueError, match="measured q: expected finite numbers, got nan at sample 0 of joint shoulder"):
        excitation.check_measured(arm, clean._replace(q=jnp.full((T, 2), jnp.nan)), jnp.zeros((T, 2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "option steps: expected a whole number"),
        ({"harmonics": 2.5}, "option harmonics: expected a whole number"),
        ({"dt": 0.0}, "option dt: expected a finite number of seconds"),
        ({"band": (0.5, 0.1)}, "option band: expected 0 < least"),
        ({"band": (0.0, 0.1)}, "option band: expected 0 < least"),
        ({"band": (0.1, 20.0)}, "option band: expected at most 5 Hz"),
        ({"margin": 1.5}, "option margin"),
    ],
)
def test_options_out_of_their_range_are_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        draw(jax.random.key(0), arms.load("reacher"), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.full((T, 2), 4.0)}, "position: expected joint shoulder within -3 and 3 rad, got 4 at sample 0"),
        ({"v": jnp.zeros((T, 2)).at[7, 1].set(9.0)}, "velocity: expected joint elbow within -5 and 5 rad/s, got 9 at sample 7"),
        ({"a": jnp.zeros((T, 2)).at[3, 0].set(jnp.nan)}, "a: expected finite numbers, got nan at sample 3 of joint shoulder"),
        ({"a": jnp.zeros((T, 2)).at[3, 0].set(-99.0)}, "torque: expected joint shoulder within -20 and 20 N m, got -99"),
        ({"q": jnp.zeros((T, 3))}, r"q: expected shape \(T, 2\)"),
    ],
)
def test_a_motion_beyond_the_limits_is_refused(change: dict[str, jax.Array], message: str):
    arm = dataclasses.replace(arms.load("reacher"), velocity_limit=jnp.full(2, 5.0))
    still = Trajectory(*(jnp.zeros((T, 2)) for _ in range(3)))
    with pytest.raises(ValueError, match=message):
        excitation.check_trajectory(arm, still._replace(**change))
