"""The equations of motion against MuJoCo's C library, against the laws of mechanics, and under JAX's transformations."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import mujoco as mujoco_c
import numpy as np
import pytest

from envs import arm as arms
from envs import rigid_body
from envs.reacher import Reacher
from envs.rigid_body import Arm
from tests.envs.dynamics import B, by_mujoco, by_rigid_body, states

mujoco: Any = mujoco_c  # compiled, without types
NAMES = ("sawyer", "iiwa", "reacher")
# Relative to the largest entry, and to sqrt(M_ii M_jj) for M: the wrist's entries are 10,000 times smaller than the shoulder's.
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


class Load(NamedTuple):
    mass: float
    offset: tuple[float, float, float]
    radius: float


LOADS = {"empty": None, "point": Load(5.0, (0.05, -0.1, 0.1), 0.0), "ball": Load(2.0, (-0.1, 0.03, 0.07), 0.06)}


def loaded(name: str, load: Load | None) -> Arm:
    arm = arms.load(name)
    return arm if load is None else rigid_body.with_load(arm, load.mass, jnp.array(load.offset), radius=load.radius)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest error among the states, each relative to the norm of its vector."""
    return float((np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)).max())


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("name", NAMES)
def test_dynamics_agree_with_mujoco(name: str, load: str, precision: str):
    tolerance = TOLERANCE[precision]
    with jax.enable_x64(precision == "float64"):
        arm = loaded(name, LOADS[load])
        assert arm.mass.dtype == precision
        q, v, a = states(arm)
        true = by_mujoco(mujoco.MjModel.from_xml_string(arms.mjcf(arm)), q, v, a)
        ours = jax.tree.map(lambda x: np.asarray(x, float), by_rigid_body(arm, q, v, a))
        scale = np.sqrt(np.diagonal(true.mass, axis1=1, axis2=2))
        assert np.abs((ours.mass - true.mass) / (scale[:, :, None] * scale[:, None, :])).max() < tolerance
        assert relative(ours.bias, true.bias) < tolerance
        assert relative(ours.torque, true.torque) < tolerance
        assert np.abs(ours.points - true.points).max() < tolerance
        # M a + h is the torque.
        by_parts = np.einsum("bij,bj->bi", ours.mass, np.asarray(a)) + ours.bias
        assert relative(by_parts, ours.torque) < tolerance
        np.testing.assert_array_equal(ours.mass, np.swapaxes(ours.mass, 1, 2))
        assert np.linalg.eigvalsh(ours.mass).min() > 0


@pytest.mark.usefixtures("x64")
def test_the_arm_named_reacher_agrees_with_the_environment():
    arm, env = arms.load("reacher"), Reacher()
    q, v, a = states(arm)
    ours = by_rigid_body(arm, q, v, a)
    np.testing.assert_allclose(ours.mass, jax.jit(jax.vmap(env.mass_matrix))(q), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(ours.points[:, -1, :2], env.tip(q), atol=1e-15)


@pytest.mark.usefixtures("x64")
def test_coriolis_forces_do_no_work():
    # v^T (dM/dt - 2 C) v = 0, with v^T dM/dt v as the gradient of v^T M(q) v along v.
    arm = dataclasses.replace(loaded("sawyer", LOADS["ball"]), damping=jnp.zeros(7), gravity=jnp.zeros(3))
    q, v, _ = states(arm)
    q = q.at[0].set(0.0)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0, 0))
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(arm: Arm, q: jax.Array, v: jax.Array) -> jax.Array:
        return v @ rigid_body.mass_matrix(arm, q) @ v

    by_arm, by_q = gradient(arm, q, v)
    chex.assert_tree_all_finite(by_arm)
    by_rate, by_force = (np.einsum("bi,bi->b", v, x) for x in (by_q, 2 * by_rigid_body(arm, q, v, v).bias))
    assert np.abs(by_rate).max() > 1e-5
    np.testing.assert_allclose(by_rate, by_force, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_a_falling_arm_keeps_its_energy():
    arm = dataclasses.replace(loaded("sawyer", LOADS["point"]), damping=jnp.zeros(7))
    model = mujoco.MjModel.from_xml_string(arms.mjcf(arm))
    model.opt.enableflags |= mujoco.mjtEnableBit.mjENBL_ENERGY

    def energies(state: np.ndarray) -> np.ndarray:
        """Potential and kinetic energy [2] by MuJoCo, J."""
        data = mujoco.MjData(model)
        data.qpos[:], data.qvel[:] = state
        mujoco.mj_forward(model, data)
        return data.energy

    def rate(state: np.ndarray) -> np.ndarray:
        """Velocity and acceleration [2, B, n] without torque: a = -M^-1 h."""
        at = by_rigid_body(arm, state[0], state[1], state[1])
        return np.stack([state[1], -np.linalg.solve(np.asarray(at.mass), np.asarray(at.bias)[..., None])[..., 0]])

    state, dt = np.stack([np.linspace(0.1, 0.7, 7 * B).reshape(B, 7), np.zeros((B, 7))]), 2e-3
    start = state
    for _ in range(100):  # Runge-Kutta of order 4
        k1 = rate(state)
        k2 = rate(state + dt / 2 * k1)
        k3 = rate(state + dt / 2 * k2)
        state = state + dt / 6 * (k1 + 2 * k2 + 2 * k3 + rate(state + dt * k3))
    for b in (0, B - 1):
        before, after = energies(start[:, b]), energies(state[:, b])
        assert after[1] > 3
        assert abs(after.sum() - before.sum()) < 1e-4 * after[1]


@pytest.mark.usefixtures("x64")
def test_the_weight_of_a_point_mass_acts_through_the_jacobian_of_its_place():
    # At rest the load's weight acts on the joints as J^T m g, with J of the place of the load.
    arm, offset = arms.load("iiwa"), jnp.array([0.1, 0.2, 0.3])
    q = jnp.linspace(-1.0, 1.0, 7)
    rest = jnp.zeros((B, 7))

    def place(q: jax.Array) -> jax.Array:
        return rigid_body.positions(dataclasses.replace(arm, hand=arm.hand + offset), q)[-1]

    held, empty = (by_rigid_body(x, jnp.tile(q, (B, 1)), rest, rest) for x in (rigid_body.with_load(arm, 3.0, offset), arm))
    expected = -3.0 * jax.jit(jax.jacobian(place))(q).T @ arm.gravity
    np.testing.assert_allclose(held.bias[0] - empty.bias[0], expected, atol=1e-9)


def test_a_load_without_mass_changes_nothing_and_a_ball_adds_its_own_inertia():
    arm, offset = arms.load("sawyer"), jnp.array([0.1, 0.0, 0.2])
    load = jax.jit(rigid_body.with_load)
    chex.assert_trees_all_equal(rigid_body.with_load(arm, 0.0, offset), arm)
    point, ball = (load(arm, 2.0, offset, radius=radius) for radius in (0.0, 0.1))
    # 2/5 m r^2 = 0.4 * 2 * 0.01
    np.testing.assert_allclose(ball.inertia[-1] - point.inertia[-1], 0.008 * np.eye(3), atol=1e-7)


def test_heavier_links_have_a_larger_inertia_matrix():
    arm = arms.load("sawyer")
    q, v, a = states(arm)
    heavy, own = (by_rigid_body(x, q, v, a).mass for x in (rigid_body.scale_masses(arm, jnp.full(7, 1.3)), arm))
    np.testing.assert_allclose(heavy, 1.3 * own, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_gradients_agree_with_finite_differences_and_are_finite_at_rest():
    arm, weights = arms.load("sawyer"), jnp.linspace(0.5, 1.5, 7)
    q, v, a = (x[0] for x in states(arm))
    inputs = [q, v, a, jnp.array(2.0)]

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(arm: Arm, inputs: list[jax.Array]) -> jax.Array:
        q, v, a, mass = inputs
        held = rigid_body.with_load(arm, mass, jnp.array([0.1, 0.0, 0.1]))
        return jnp.sum(weights * rigid_body.inverse_dynamics(held, q, v, a))

    gradient, eps = loss(arm, inputs)[1][1], 1e-5
    for i, value in enumerate(inputs):
        direction = jnp.cos(jnp.arange(1.0, 1.0 + value.size)).reshape(value.shape)
        above, below = (loss(arm, [*inputs[:i], value + e * direction, *inputs[i + 1 :]])[0] for e in (eps, -eps))
        np.testing.assert_allclose(jnp.vdot(gradient[i], direction), (above - below) / (2 * eps), rtol=1e-6, atol=1e-7)
    chex.assert_tree_all_finite(loss(arm, [jnp.zeros_like(value) for value in inputs])[1])


def test_loads_under_vmap_and_jit_agree_with_one_eager_call():
    arm, tasks = arms.load("reacher"), 2
    q, v, a = (x[:tasks] for x in states(arm))
    masses, offsets = jnp.linspace(1.0, 5.0, tasks), 0.1 * jax.random.normal(jax.random.key(1), (tasks, 3))

    @jax.jit
    def torques(masses: jax.Array, offsets: jax.Array, q: jax.Array, v: jax.Array, a: jax.Array) -> jax.Array:
        held = jax.vmap(lambda mass, offset: rigid_body.with_load(arm, mass, offset))(masses, offsets)  # arms stack
        return jax.vmap(rigid_body.inverse_dynamics)(held, q, v, a)

    alone = rigid_body.inverse_dynamics(rigid_body.with_load(arm, masses[1], offsets[1]), q[1], v[1], a[1])
    np.testing.assert_allclose(torques(masses, offsets, q, v, a)[1], alone, rtol=1e-4, atol=1e-4)


def test_an_arm_that_is_loaded_twice_is_traced_once():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def weight(arm: Arm) -> jax.Array:
        return arm.mass.sum()

    assert weight(arms.load("sawyer")) == weight(arms.load("sawyer"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda arm: rigid_body.inverse_dynamics(arm, jnp.zeros(6), jnp.zeros(7), jnp.zeros(7)), r"q: expected shape \(7,\)"),
        (lambda arm: rigid_body.bias_forces(arm, jnp.zeros(7), jnp.zeros((2, 7))), r"v: .* got \(2, 7\).*vmap"),
        (lambda arm: rigid_body.mass_matrix(arm, jnp.zeros(())), r"q: expected shape \(7,\)"),
        (lambda arm: rigid_body.positions(arm, jnp.zeros(8)), "q: expected"),
        (lambda arm: rigid_body.scale_masses(arm, jnp.ones(3)), "factors: expected"),
        (lambda arm: rigid_body.with_load(arm, 1.0, jnp.zeros(2)), "load: expected a scalar mass, an offset"),
        (lambda arm: rigid_body.with_load(arm, jnp.ones(3), jnp.zeros(3)), "one load, use jax.vmap"),
    ],
)
def test_a_wrong_shape_is_refused_by_its_name(call: Callable[[Arm], Any], message: str):
    with pytest.raises(ValueError, match=message):
        call(arms.load("sawyer"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mass": [1.0, 0.0]}, "link of joint elbow: expected a mass and moments of inertia above 0"),
        ({"com": np.full((2, 3), np.nan)}, "com: expected finite numbers"),
        ({"com": np.zeros(2)}, r"com: expected shape \(2, 3\)"),
        ({"axis": np.ones((2, 3))}, "joint shoulder: expected a rotation and an axis of length 1"),
        ({"home": [0.0, 4.0]}, "joint elbow: expected limits around home, got -3 to 3 around 4"),
        ({"torque_limit": [1.0, np.nan]}, "torque_limit: expected finite numbers"),
    ],
)
def test_an_impossible_arm_is_refused(change: dict[str, Any], message: str):
    arm = arms.load("reacher")
    fields = {field.name: np.asarray(getattr(arm, field.name)) for field in dataclasses.fields(arm)}
    fields.pop("joint_names")
    with pytest.raises(ValueError, match=message):
        rigid_body.make_arm(joint_names=arm.joint_names, **(fields | change))
