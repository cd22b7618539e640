"""Arms by name against their data, MJCF written and read back, refused models, and the checks of loads."""

import json
import math
from typing import Any

import chex
import jax.numpy as jnp
import mujoco as mujoco_c
import numpy as np
import pytest

from envs import arm as arms
from envs import rigid_body
from envs.reacher_mjx import MODEL
from tests.envs.dynamics import B, by_rigid_body

mujoco: Any = mujoco_c  # compiled, without types
SEVEN = ("iiwa", "sawyer")

# An arm of two hinges with a gripper, on a base that also carries a head. `ref` shifts the elbow's zero.
GRIPPER = """<mujoco>
  <compiler angle="radian" autolimits="true"/>
  <worldbody>
    <body name="base" pos="0 0 0.5" euler="0.2 0 0">
      <inertial pos="0 0 0" mass="9" diaginertia="1 1 1"/>
      <body name="head" pos="0 0 1">
        <joint name="pan" axis="0 0 1"/>
        <inertial pos="0 0 0" mass="2" diaginertia="1 1 1"/>
      </body>
      <body name="upper" pos="0.1 0 0" euler="0 0.4 0">
        <joint name="shoulder" axis="0 1 0" pos="0 0.02 0" range="-2 1" actuatorfrcrange="-30 30" damping="0.3"/>
        <inertial pos="0.2 0 0.03" mass="3" diaginertia="0.02 0.03 0.04" euler="0.1 0.2 0.3"/>
        <body name="lower" pos="0.4 0 0" euler="0.3 0 0">
          <joint name="elbow" axis="0 0.6 0.8" ref="0.5" armature="0.1"/>
          <inertial pos="0.1 0 0" mass="1" diaginertia="0.01 0.01 0.01"/>
          <body name="palm" pos="0.3 0 0" euler="0 0 0.7">
            <inertial pos="0 0.05 0" mass="0.5" diaginertia="0.001 0.002 0.002"/>
            <site name="hand" pos="0.05 0 0"/>
            <body name="finger" pos="0.1 0 0">
              <joint name="grip" type="slide" axis="0 1 0"/>
              <inertial pos="0 0 0" mass="0.2" diaginertia="0.001 0.001 0.001"/>
            </body>
          </body>
        </body>
      </body>
    </body>
  </worldbody>
  <actuator>
    <motor joint="elbow" gear="10" ctrlrange="-2 2"/>
  </actuator>
</mujoco>"""


def assert_same_dynamics(arm: rigid_body.Arm, model: Any, dofs: list[int]) -> None:
    """Compares M and h with those of some joints of a model; its other joints rest at their start."""
    q, v = np.random.default_rng(0).uniform(-2, 2, (2, B, arm.size))
    ours, data = by_rigid_body(arm, q, v, v), mujoco.MjData(model)
    for b in range(5):
        data.qpos[dofs], data.qvel[dofs] = q[b], v[b]
        mujoco.mj_forward(model, data)
        mass = np.zeros((model.nv, model.nv))
        mujoco.mj_fullM(model, data, mass)
        np.testing.assert_allclose(ours.mass[b], mass[np.ix_(dofs, dofs)], rtol=1e-10, atol=1e-11)
        np.testing.assert_allclose(ours.bias[b], (data.qfrc_bias - data.qfrc_passive)[dofs], rtol=1e-10, atol=1e-11)


def raw_model(name: str) -> Any:
    """The data file as a MuJoCo model, its numbers untouched."""
    text, ends = "", ""
    data = json.loads(arms.DATA.read_text())["arms"][name]
    for link in data["links"]:
        say = {k: " ".join(map(str, v)) for k, v in link.items() if isinstance(v, list)}
        text += f'<body pos="{say["pos"]}" quat="{say["quat"]}"><joint axis="{say["axis"]}" damping="{link["damping"]}"/>'
        text += f'<inertial pos="{say["com"]}" mass="{link["mass"]}" diaginertia="{say["diaginertia"]}" quat="{say["iquat"]}"/>'
        ends += "</body>"
    return mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{text}{ends}</worldbody></mujoco>")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", SEVEN)
def test_an_arm_agrees_with_its_data(name: str):
    arm = arms.load(name)
    assert_same_dynamics(arm, raw_model(name), list(range(7)))
    assert len(set(arm.joint_names)) == arm.size == 7
    assert np.isfinite([arm.lower, arm.upper, arm.velocity_limit, arm.torque_limit]).all()


@pytest.mark.parametrize("name", SEVEN)
def test_the_data_name_their_source_and_licence(name: str):
    data = json.loads(arms.DATA.read_text())
    assert "Copyright" in data["arms"][name]["licence"]
    assert data["arms"][name]["source"]
    assert "above copyright notice and this permission notice" in data["mit_licence"]


@pytest.mark.parametrize("name", SEVEN)
def test_an_arm_holds_5_kg_at_home(name: str):
    arm = arms.load(name)
    held = rigid_body.with_load(arm, 5.0, jnp.array([0.03, 0.03, 0.1]))
    rest = jnp.zeros((B, 7))
    torque = by_rigid_body(held, jnp.tile(arm.home, (B, 1)), rest, rest).bias[0]
    assert (np.abs(torque) < 0.5 * np.asarray(arm.torque_limit)).all()


@pytest.mark.usefixtures("x64")
def test_the_arm_named_reacher_agrees_with_its_model():
    text = MODEL.read_text()
    read, own = arms.from_mjcf(MODEL), arms.load("reacher")
    assert_same_dynamics(own, mujoco.MjModel.from_xml_string(text), [0, 1])
    # The file has no torque limits and no hand. MuJoCo's capsule differs by 1e-5 about its own axis, about which nothing turns.
    for field in ("translation", "axis", "mass", "com", "armature", "damping", "gravity", "lower", "upper"):
        np.testing.assert_allclose(getattr(read, field), getattr(own, field), rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", arms.names())
def test_a_written_model_is_read_back_unchanged(name: str):
    arm = rigid_body.with_load(arms.load(name), 2.0, jnp.array([0.1, 0.2, 0.0]))
    back = arms.from_mjcf(arms.mjcf(arm))
    assert back.joint_names == arm.joint_names
    chex.assert_trees_all_close(back, arm, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("x64")
def test_bodies_without_a_named_joint_are_part_of_the_link_before():
    arm = arms.from_mjcf(GRIPPER, joints=["shoulder", "elbow"])
    model = mujoco.MjModel.from_xml_string(GRIPPER)
    dofs = [model.joint(name).dofadr[0] for name in arm.joint_names]
    assert_same_dynamics(arm, model, dofs)
    np.testing.assert_allclose(arm.mass, [3.0, 1.7])
    np.testing.assert_array_equal(arm.lower, [-2.0, -math.inf])
    np.testing.assert_array_equal(arm.torque_limit, [30.0, 20.0])
    np.testing.assert_array_equal(arm.home, [0.0, 0.5])
    data = mujoco.MjData(model)
    data.qpos[dofs] = 0.3, -0.4
    mujoco.mj_kinematics(model, data)
    q = np.tile([0.3, -0.4], (B, 1))
    np.testing.assert_allclose(by_rigid_body(arm, q, q, q).points[0, -1], data.site_xpos[0], atol=1e-12)


def test_a_missing_file_is_refused_by_its_path(tmp_path):
    path = tmp_path / "arm.xml"
    with pytest.raises(FileNotFoundError, match=r"text of a model or the path of a file, got .*arm\.xml"):
        arms.from_mjcf(path)
    path.write_text(GRIPPER)
    assert arms.from_mjcf(str(path), joints=["shoulder", "elbow"]).size == 2


@pytest.mark.parametrize(
    ("text", "joints", "message"),
    [
        (GRIPPER, ["shoulder", "wrist", "flange"], r"joints \['wrist', 'flange'\]: expected hinges of the model, which has"),
        (GRIPPER, [], "expected hinges"),
        (GRIPPER, ["shoulder", "elbow", "grip"], r"joints \['grip'\]: expected hinges, got other joints"),
        (GRIPPER, None, r"joints \['grip'\]"),
        (GRIPPER, ["pan", "shoulder"], "joint shoulder: expected it to follow pan, got it after the base"),
        (GRIPPER, ["elbow", "shoulder"], "joint shoulder: expected it to follow elbow, got it after the base"),
        (GRIPPER.replace('damping="0.3"', 'frictionloss="0.3"'), ["shoulder"], "joint shoulder: .* dry friction"),
        (GRIPPER.replace('damping="0.3"', 'stiffness="2"'), ["shoulder"], "joint shoulder: .* stiffness 2"),
        ("<mujoco><worldbody/></mujoco>", None, "expected hinges of the model"),
        ("<mujoco><oops/></mujoco>", None, "MuJoCo rejects the model"),
    ],
)
def test_a_model_without_the_named_chain_is_refused(text: str, joints: list[str] | None, message: str):
    with pytest.raises(ValueError, match=message):
        arms.from_mjcf(text, joints=joints)


def test_an_unknown_arm_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"unknown arm 'panda' \(one of iiwa, sawyer, reacher\)"):
        arms.load("panda")


@pytest.mark.parametrize("name", SEVEN)
def test_the_loads_of_the_experiment_are_accepted(name: str):
    for mass, offset in ((0.0, [0.0, 0.0, 0.0]), (5.0, [0.0, 0.0, 0.0]), (5.0, [0.1, 0.1, 0.1])):
        arms.check_load(arms.load(name), mass, offset, radius=0.05)


@pytest.mark.parametrize(
    ("mass", "offset", "options", "message"),
    [
        (1000.0, [0.0, 0.0, 0.0], {}, "mass 1000 kg at .* ill-conditioned: expected .* at most 1e[+]05 in every posture, got"),
        (-1.0, [0.0, 0.0, 0.0], {}, "load: mass: expected a number of at least 0"),
        (math.nan, [0.0, 0.0, 0.0], {}, "load: mass: expected finite numbers, got nan"),
        (1.0, [0.0, math.inf, 0.0], {}, r"load: offset: expected finite numbers, got \[0.0, inf, 0.0\]"),
        (1.0, [0.0, 0.0], {}, r"load: offset: expected shape \(3,\), got \(2,\)"),
        (1.0, [0.0, 0.0, 0.0], {"radius": -0.1}, "load: radius: expected a number of at least 0"),
    ],
)
def test_a_load_that_cannot_be_held_is_refused(mass: float, offset: list[float], options: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        arms.check_load(arms.load("sawyer"), mass, offset, **options)
