"""Motions against finite differences and the limits of arms, measurement noise, and refused input."""

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
LONG = 2000  # samples of the reacher's motions


def draw(key: jax.Array, arm: Arm, **options: Any) -> Trajectory:
    return excitation.sample_trajectory(key, arm, **({"steps": T, "dt": DT} | options))


def carrying(arm: Arm, mass: float) -> Arm:
    return rigid_body.with_load(arm, mass, jnp.array([0.03, -0.03, 0.08]))


@jax.jit  # once per arm: loads are arguments
def motions(keys: jax.Array, arm: Arm) -> Trajectory:
    """One motion per key, [M, T, n]; [M, LONG, n] for the reacher."""
    return jax.vmap(lambda key: draw(key, arm, steps=T if arm.size == 7 else LONG))(keys)


@pytest.mark.parametrize(("name", "mass"), [("sawyer", 0.0), ("sawyer", 5.0), ("reacher", 1.0)])
def test_motions_keep_the_limits_and_move_every_joint(name: str, mass: float):
    arm = carrying(arms.load(name), mass)
    trajectory = jax.tree.map(np.asarray, motions(jax.random.split(jax.random.key(0), M), arm))
    assert (np.abs(trajectory.v) <= arm.velocity_limit).all()
    assert ((trajectory.q >= arm.lower) & (trajectory.q <= arm.upper)).all()
    assert trajectory.v.std(axis=1).min() > 0.02
    torque_limit = (0.95 + 1e-4) * arm.torque_limit  # the default margin, and rounding
    for i in range(M):
        one = jax.tree.map(lambda x, i=i: x[i], trajectory)
        excitation.check_trajectory(dataclasses.replace(arm, torque_limit=torque_limit), one)


def test_a_load_shrinks_motions_only_if_it_must():
    arm, keys = arms.load("sawyer"), jax.random.split(jax.random.key(1), M)
    strong = dataclasses.replace(carrying(arm, 5.0), torque_limit=jnp.inf * arm.torque_limit)
    light, heavy, free = (jax.tree.map(np.asarray, motions(keys, x)) for x in (arm, carrying(arm, 5.0), strong))
    ratio = heavy.v.std(axis=(1, 2)) / light.v.std(axis=(1, 2))
    assert ratio.min() < 0.9
    assert ratio.max() <= 1.0 + 1e-6
    np.testing.assert_allclose(free.q, light.q, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_derivatives_are_exact():
    dt = 1e-4
    arm = carrying(arms.load("reacher"), 2.0)
    q, v, a = jax.tree.map(np.asarray, jax.jit(lambda key: draw(key, arm, steps=500, dt=dt))(jax.random.key(2)))
    # The error of central differences is dt^2 / 6 times the third derivative, here below 1e2.
    np.testing.assert_allclose((q[2:] - q[:-2]) / (2 * dt), v[1:-1], atol=1e-6)
    np.testing.assert_allclose((v[2:] - v[:-2]) / (2 * dt), a[1:-1], atol=1e-6)


def test_motions_do_not_repeat():
    for q in np.asarray(motions(jax.random.split(jax.random.key(3), M), arms.load("reacher")).q):
        start = q[:200] - q[:200].mean(axis=0)
        for shift in range(400, LONG - 200, 50):
            again = q[shift : shift + 200]
            assert np.abs(again - again.mean(axis=0) - start).max() > 0.05


def test_motions_under_vmap_and_jit_equal_one_eager_call_and_differ_by_key():
    arm, keys = carrying(arms.load("reacher"), 3.0), jax.random.split(jax.random.key(4), M)
    batch, alone = motions(keys, arm), draw(keys[1], arm, steps=LONG)
    for one, many in zip(alone, batch, strict=True):
        # float32 phases of a long motion: two programs differ by 1e-4.
        np.testing.assert_allclose(one, many[1], atol=2e-4)
    assert jnp.abs(batch.q[0] - batch.q[1]).max() > 0.1


def test_joints_without_limits_move_about_home():
    arm = arms.load("reacher")
    free = dataclasses.replace(arm, lower=jnp.inf * arm.lower, upper=jnp.inf * arm.upper, home=jnp.array([5.0, -5.0]))
    q = np.asarray(motions(jax.random.split(jax.random.key(5), M), free).q)
    assert (np.abs(q - np.asarray(free.home)) < np.pi).all()
    assert q.std(axis=1).min() > 0.1


def test_an_arm_too_weak_for_its_load_rests_and_is_refused():
    arm = carrying(arms.load("sawyer"), 100.0)
    trajectory = jax.tree.map(lambda x: np.asarray(x[0]), motions(jax.random.split(jax.random.key(6), M), arm))
    np.testing.assert_array_equal(trajectory.q, np.tile(arm.home, (T, 1)))
    with pytest.raises(ValueError, match=r"torque: expected joint right_j\d within"):
        excitation.check_trajectory(arm, trajectory)
    with pytest.raises(ValueError, match="got an arm at rest"):
        excitation.check_trajectory(arms.load("sawyer"), trajectory)


def test_noise_has_the_given_standard_deviation():
    clean = Trajectory(*(jnp.zeros((1000, 3)) for _ in range(3)))
    noise = Noise(q=0.1, v=0.0, a=jnp.array([1.0, 2.0, 3.0]), torque=0.5)
    measured, torque = jax.tree.map(np.asarray, excitation.measure(jax.random.key(7), clean, jnp.ones((1000, 3)), noise))
    np.testing.assert_allclose(measured.q.std(axis=0), 0.1, rtol=0.15)
    np.testing.assert_array_equal(measured.v, 0.0)
    np.testing.assert_allclose(measured.a.std(axis=0), [1.0, 2.0, 3.0], rtol=0.15)
    np.testing.assert_allclose(torque.std(axis=0), 0.5, rtol=0.15)
    np.testing.assert_allclose(torque.mean(axis=0), 1.0, atol=0.05)
    assert np.abs(np.mean(measured.q * (torque - 1))) < 0.008
    with pytest.raises(ValueError, match=r"torque: expected shape \(1000, 3\)"):
        excitation.measure(jax.random.key(7), clean, jnp.ones((1000, 2)), noise)


def test_measurements_that_are_not_finite_are_refused_with_their_sample_and_joint():
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
        ({"steps": 2.5}, "option steps: expected a whole number"),
        ({"dt": 0.0}, "option dt: expected a finite number of seconds"),
        ({"band": (0.5, 0.1)}, "option band: expected 0 < least"),
        ({"band": (0.0, 0.1)}, "option band: expected 0 < least"),
        ({"band": (0.1, 20.0)}, "option band: expected at most 5 Hz"),
    ],
)
def test_an_option_out_of_its_range_is_refused_by_its_name(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        draw(jax.random.key(0), arms.load("reacher"), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.full((T, 2), 4.0)}, "position: expected joint shoulder within -3 and 3 rad, got 4 at sample 0"),
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
