"""The equations of motion against MuJoCo's C library, against the laws of mechanics, and under JAX's transformations."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mujoco as mujoco_c
import numpy as np
import pytest
from jax.test_util import check_grads

from envs import arm as arms
from envs import rigid_body
from envs.reacher import Reacher
from envs.rigid_body import Arm

mujoco: Any = mujoco_c  # compiled, without types
B = 64
NAMES = ("sawyer", "iiwa", "reacher")
# Of the largest entry, and of sqrt(M_ii M_jj) for the entries of M: the wrist's are 10,000 times smaller than the shoulder's.
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


class Load(NamedTuple):
    mass: float
    offset: tuple[float, float, float]
    radius: float


LOADS = {"empty": None, "point": Load(5.0, (0.05, -0.1, 0.1), 0.0), "ball": Load(2.0, (-0.1, 0.03, 0.07), 0.06)}


def loaded(name: str, load: Load | None) -> Arm:
    arm = arms.load(name)
    return arm if load is None else rigid_body.with_load(arm, load.mass, jnp.array(load.offset), radius=load.radius)


def states(arm: Arm, n: int = B) -> tuple[jax.Array, ...]:
    """Angles, velocities, accelerations and torques [n, joints], far beyond what a motion has."""
    keys = jax.random.split(jax.random.key(0), 4)
    scales = (np.pi, 3.0, 10.0, 20.0)
    return tuple(s * jax.random.uniform(k, (n, arm.size), minval=-1.0) for k, s in zip(keys, scales, strict=True))


class Physics(NamedTuple):
    """All that is computed of B states."""

    mass: jax.Array  # [B, n, n]
    bias: jax.Array  # [B, n]
    torque: jax.Array  # [B, n]
    points: jax.Array  # [B, n + 1, 3]


@jax.jit  # once an arm and a precision: loads are arguments
def physics(arm: Arm, q: jax.Array, v: jax.Array, a: jax.Array) -> Physics:
    def one(q: jax.Array, v: jax.Array, a: jax.Array) -> Physics:
        return Physics(
            mass=rigid_body.mass_matrix(arm, q),
            bias=rigid_body.bias_forces(arm, q, v),
            torque=rigid_body.inverse_dynamics(arm, q, v, a),
            points=rigid_body.positions(arm, q),
        )

    return jax.vmap(one)(q, v, a)


class ByMujoco(NamedTuple):
    mass: np.ndarray  # [B, n, n]
    bias: np.ndarray  # [B, n]
    torque: np.ndarray  # [B, n]
    points: np.ndarray  # [B, n + 1, 3]


def by_mujoco(model: Any, q: jax.Array, v: jax.Array, a: jax.Array) -> ByMujoco:
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_LIMIT
    data, rows = mujoco.MjData(model), []
    for values in zip(np.asarray(q, float), np.asarray(v, float), np.asarray(a, float), strict=True):
        data.qpos[:], data.qvel[:], data.qacc[:] = values
        mujoco.mj_inverse(model, data)
        mass = np.zeros((model.nv, model.nv))
        mujoco.mj_fullM(model, data, mass)
        points = np.concatenate([data.xanchor, data.site_xpos])
        rows.append(ByMujoco(mass, data.qfrc_bias - data.qfrc_passive, data.qfrc_inverse.copy(), points))
    return ByMujoco(*(np.stack(column) for column in zip(*rows, strict=True)))


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest error of a state's vector, of the vector's length."""
    return float((np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)).max())


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("name", NAMES)
def test_dynamics_are_those_of_mujoco(name: str, load: str, precision: str):
    tolerance = TOLERANCE[precision]
    with jax.enable_x64(precision == "float64"):
        arm = loaded(name, LOADS[load])
        assert arm.mass.dtype == precision
        q, v, a, _ = states(arm)
        true = by_mujoco(mujoco.MjModel.from_xml_string(arms.mjcf(arm)), q, v, a)
        ours = jax.tree.map(lambda x: np.asarray(x, float), physics(arm, q, v, a))
        scale = np.sqrt(np.diagonal(true.mass, axis1=1, axis2=2))
        assert np.abs((ours.mass - true.mass) / (scale[:, :, None] * scale[:, None, :])).max() < tolerance
        assert relative(ours.bias, true.bias) < tolerance
        assert relative(ours.torque, true.torque) < tolerance
        assert np.abs(ours.points - true.points).max() < tolerance
        # The parts make the whole.
        by_parts = np.einsum("bij,bj->bi", ours.mass, np.asarray(a)) + ours.bias
        assert relative(by_parts, ours.torque) < tolerance
        np.testing.assert_array_equal(ours.mass, np.swapaxes(ours.mass, 1, 2))
        assert np.linalg.eigvalsh(ours.mass).min() > 0


@pytest.mark.parametrize("precision", TOLERANCE)
def test_forward_dynamics_undo_inverse_dynamics(precision: str):
    with jax.enable_x64(precision == "float64"):
        arm = loaded("sawyer", LOADS["point"])
        q, v, _, tau = states(arm)
        acceleration = jax.jit(jax.vmap(rigid_body.forward_dynamics, in_axes=(None, 0, 0, 0)))(arm, q, v, tau)
        # The acceleration is as precise as M's condition (1e4) lets it be, so it is its torque that is compared.
        given = np.asarray(physics(arm, q, v, acceleration).torque)
        assert relative(given, np.asarray(tau)) < 100 * TOLERANCE[precision]


@pytest.mark.usefixtures("x64")
def test_the_arm_of_the_environment_is_the_reacher():
    arm, env = arms.load("reacher"), Reacher()
    q, v, a, _ = states(arm)
    ours = physics(arm, q, v, a)
    np.testing.assert_allclose(ours.mass, jax.vmap(env.mass_matrix)(q), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(ours.points[:, -1, :2], env.tip(q), atol=1e-15)


@pytest.mark.usefixtures("x64")
def test_coriolis_forces_do_no_work():
    # v^T (dM/dt - 2 C) v = 0
    arm = dataclasses.replace(loaded("sawyer", LOADS["ball"]), damping=jnp.zeros(7))
    weightless = dataclasses.replace(arm, gravity=jnp.zeros(3))
    q, v, _, _ = states(arm)

    def powers(q: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, rate = jax.jvp(lambda q: rigid_body.mass_matrix(arm, q), (q,), (v,))
        return v @ rate @ v, 2 * v @ rigid_body.bias_forces(weightless, q, v)

    by_rate, by_force = jax.jit(jax.vmap(powers))(q, v)
    assert jnp.abs(by_rate).max() > 1e-5
    np.testing.assert_allclose(by_rate, by_force, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_a_falling_arm_keeps_its_energy():
    arm = loaded("sawyer", LOADS["point"])
    arm = dataclasses.replace(arm, damping=jnp.zeros(7))

    model = mujoco.MjModel.from_xml_string(arms.mjcf(arm))
    model.opt.enableflags |= mujoco.mjtEnableBit.mjENBL_ENERGY

    def energies(state: jax.Array) -> np.ndarray:
        """Potential and kinetic energy [2] as MuJoCo has them, J."""
        data = mujoco.MjData(model)
        data.qpos[:], data.qvel[:] = np.asarray(state)
        mujoco.mj_forward(model, data)
        return data.energy

    def rate(state: jax.Array) -> jax.Array:
        return jnp.stack([state[1], rigid_body.forward_dynamics(arm, state[0], state[1], jnp.zeros(7))])

    def step(state: jax.Array, _: None) -> tuple[jax.Array, None]:  # Runge-Kutta of order 4
        dt = 1e-3
        k1 = rate(state)
        k2 = rate(state + dt / 2 * k1)
        k3 = rate(state + dt / 2 * k2)
        return state + dt / 6 * (k1 + 2 * k2 + 2 * k3 + rate(state + dt * k3)), None

    start = jnp.stack([jnp.linspace(0.1, 0.7, 7), jnp.zeros(7)])
    end, _ = jax.jit(lambda x: jax.lax.scan(step, x, None, length=300))(start)
    before, after = energies(start), energies(end)
    assert after[1] > 10
    assert abs(after.sum() - before.sum()) < 1e-6 * after[1]


def test_a_point_mass_pulls_down_the_hand():
    # At rest the load's weight acts on the joints as J^T m g, with J of the place where it is held.
    arm, offset = arms.load("iiwa"), jnp.array([0.1, 0.2, 0.3])
    q = jnp.linspace(-1.0, 1.0, 7)
    rest = jnp.zeros(7)

    def place(q: jax.Array) -> jax.Array:
        return rigid_body.positions(dataclasses.replace(arm, hand=arm.hand + offset), q)[-1]

    bias = jax.jit(rigid_body.bias_forces)
    more = bias(rigid_body.with_load(arm, 3.0, offset), q, rest) - bias(arm, q, rest)
    np.testing.assert_allclose(more, -3.0 * jax.jit(jax.jacobian(place))(q).T @ arm.gravity, atol=1e-4)


def test_a_load_without_mass_changes_nothing_and_a_ball_adds_its_own_inertia():
    arm, offset = arms.load("sawyer"), jnp.array([0.1, 0.0, 0.2])
    for ours, theirs in zip(jax.tree.leaves(rigid_body.with_load(arm, 0.0, offset)), jax.tree.leaves(arm), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    point = rigid_body.with_load(arm, 2.0, offset)
    ball = rigid_body.with_load(arm, 2.0, offset, radius=0.1)
    # 2/5 m r^2 = 0.4 * 2 * 0.01
    np.testing.assert_allclose(ball.inertia[-1] - point.inertia[-1], 0.008 * np.eye(3), atol=1e-7)


def test_heavier_links_weigh_more():
    arm, q = arms.load("sawyer"), jnp.linspace(-1.0, 1.0, 7)
    heavy = rigid_body.scale_masses(arm, jnp.full(7, 1.3))
    mass = jax.jit(rigid_body.mass_matrix)
    np.testing.assert_allclose(mass(heavy, q), 1.3 * mass(arm, q), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_gradients_are_those_of_finite_differences():
    arm = arms.load("sawyer")
    q, v, a, _ = (x[0] for x in states(arm, 1))

    @jax.jit
    def torque(q: jax.Array, v: jax.Array, a: jax.Array, mass: jax.Array) -> jax.Array:
        return rigid_body.inverse_dynamics(rigid_body.with_load(arm, mass, jnp.array([0.1, 0.0, 0.1])), q, v, a)

    check_grads(torque, (q, v, a, jnp.array(2.0)), order=1, modes=("rev",), atol=1e-5, rtol=1e-5)


def test_gradients_are_finite_where_nothing_moves():
    arm = arms.load("sawyer")
    zero = jnp.zeros(7)

    def loss(arm: Arm, q: jax.Array, v: jax.Array, a: jax.Array) -> jax.Array:
        return jnp.sum(rigid_body.inverse_dynamics(arm, q, v, a) ** 2) + jnp.sum(rigid_body.mass_matrix(arm, q) ** 2)

    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(arm, zero, zero, zero)):
        assert jnp.isfinite(leaf).all()


def test_loads_are_drawn_under_vmap_and_jit_as_in_one_eager_call():
    arm, tasks = arms.load("sawyer"), 2
    q, v, a, _ = states(arm, tasks)
    masses, offsets = jnp.linspace(0.0, 5.0, tasks), 0.1 * jax.random.normal(jax.random.key(1), (tasks, 3))

    def torque(mass: jax.Array, offset: jax.Array, q: jax.Array, v: jax.Array, a: jax.Array) -> jax.Array:
        return rigid_body.inverse_dynamics(rigid_body.with_load(arm, mass, offset), q, v, a)

    together = jax.jit(jax.vmap(torque))(masses, offsets, q, v, a)
    alone = torque(masses[1], offsets[1], q[1], v[1], a[1])
    np.testing.assert_allclose(together[1], alone, rtol=1e-4, atol=1e-4)
    held = jax.vmap(lambda m, o: rigid_body.with_load(arm, m, o))(masses, offsets)  # arms are pytrees that stack
    stacked = jax.jit(jax.vmap(rigid_body.inverse_dynamics))(held, q, v, a)
    np.testing.assert_allclose(stacked, together, rtol=1e-4, atol=1e-4)


def test_calls_trace_once():
    traces = []

    @jax.jit
    def torque(arm: Arm, q: jax.Array) -> jax.Array:
        traces.append(1)
        return rigid_body.bias_forces(arm, q, q)

    for name in ("sawyer", "sawyer"):
        torque(arms.load(name), jnp.zeros(7))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda arm: rigid_body.inverse_dynamics(arm, jnp.zeros(6), jnp.zeros(7), jnp.zeros(7)), r"q: expected shape \(7,\)"),
        (lambda arm: rigid_body.bias_forces(arm, jnp.zeros(7), jnp.zeros((2, 7))), r"v: .* got \(2, 7\).*vmap"),
        (lambda arm: rigid_body.mass_matrix(arm, jnp.zeros(())), r"q: expected shape \(7,\)"),
        (lambda arm: rigid_body.forward_dynamics(arm, jnp.zeros(7), jnp.zeros(7), jnp.zeros(8)), "tau: expected"),
        (lambda arm: rigid_body.positions(arm, jnp.zeros(8)), "q: expected"),
        (lambda arm: rigid_body.scale_masses(arm, jnp.ones(3)), "factors: expected"),
        (lambda arm: rigid_body.with_load(arm, 1.0, jnp.zeros(2)), "load: expected a scalar mass, an offset"),
        (lambda arm: rigid_body.with_load(arm, jnp.ones(3), jnp.zeros(3)), "one load, use jax.vmap"),
    ],
)
def test_wrong_shapes_are_named(call: Callable[[Arm], Any], message: str):
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
def test_an_arm_that_cannot_be_is_refused(change: dict[str, Any], message: str):
    arm = arms.load("reacher")
    fields = {field.name: np.asarray(getattr(arm, field.name)) for field in dataclasses.fields(arm)}
    fields.pop("joint_names")
    with pytest.raises(ValueError, match=message):
        rigid_body.make_arm(joint_names=arm.joint_names, **(fields | change))
