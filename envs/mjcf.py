"""Arms as MuJoCo's MJCF: `mjcf` writes a model of an arm, `from_mjcf` reads a chain of hinges from a model.

These functions run on the host, not under a transformation. Only reading a model imports MuJoCo.
"""

import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np

from envs.rigid_body import Arm, make_arm


def mjcf(arm: Arm, *, name: str = "arm") -> str:
    """A MuJoCo model of one arm, with a motor per joint and a site "hand". `from_mjcf` reads it back.

    MJCF has no velocity limits. They are stored as the custom numbers "velocity_limit", 0 if a joint has none.

    Args:
      arm: one arm.
      name: name of the model.

    Returns:
      The text of an MJCF file. Numbers keep all digits.
    """
    root = ElementTree.Element("mujoco", model=name)
    ElementTree.SubElement(root, "compiler", angle="radian", autolimits="true")
    option = ElementTree.SubElement(root, "option", gravity=_text(arm.gravity), integrator="implicitfast")
    ElementTree.SubElement(option, "flag", contact="disable")
    custom = ElementTree.SubElement(root, "custom")
    speeds = np.asarray(arm.velocity_limit, float)
    ElementTree.SubElement(custom, "numeric", name="velocity_limit", data=_text(np.where(np.isfinite(speeds), speeds, 0)))
    body = ElementTree.SubElement(root, "worldbody")
    motors = ElementTree.SubElement(root, "actuator")
    for i, joint in enumerate(arm.joint_names):
        body = ElementTree.SubElement(body, "body", name=f"{joint}_link", pos=_text(arm.translation[i]))
        body.set("quat", _text(_quaternion(np.asarray(arm.rotation[i], float))))
        moments, axes = np.linalg.eigh(np.asarray(arm.inertia[i], float))
        axes = axes * np.array([1, 1, np.sign(np.linalg.det(axes))])
        inertial = ElementTree.SubElement(body, "inertial", pos=_text(arm.com[i]), mass=_text(arm.mass[i]))
        inertial.set("diaginertia", _text(moments))
        inertial.set("quat", _text(_quaternion(axes)))
        hinge = ElementTree.SubElement(body, "joint", name=joint, type="hinge", axis=_text(arm.axis[i]))
        hinge.set("armature", _text(arm.armature[i]))
        hinge.set("damping", _text(arm.damping[i]))
        if np.isfinite([arm.lower[i], arm.upper[i]]).all():
            hinge.set("range", _text([arm.lower[i], arm.upper[i]]))
        if np.isfinite(arm.torque_limit[i]):
            hinge.set("actuatorfrcrange", _text([-arm.torque_limit[i], arm.torque_limit[i]]))
        ElementTree.SubElement(motors, "motor", name=joint, joint=joint)
    ElementTree.SubElement(body, "site", name="hand", pos=_text(arm.hand))
    keys = ElementTree.SubElement(root, "keyframe")
    ElementTree.SubElement(keys, "key", name="home", qpos=_text(arm.home))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def from_mjcf(source: str | os.PathLike[str], *, joints: Sequence[str] | None = None) -> Arm:
    """Reads an arm from an MJCF: the chain of the named hinges. Every other joint stays at the model's start.

    Each body moves with the nearest named joint above it in the tree, so a gripper becomes part of the last link. Torque
    limits come from `actuatorfrcrange`, or else from a motor's control range. Velocity limits are the custom numbers that
    `mjcf` writes. The hand is the site "hand" of the last link, or else its origin. Home is the keyframe "home", or else the
    model's start, clipped to the limits.

    Args:
      source: the text of a model, or the path of a file.
      joints: names of the joints, from the base to the hand; None: all joints of the model.

    Returns:
      The arm.

    Raises:
      ValueError: not a model, missing joints, joints that are no hinges or do not form a chain in this order, a joint with dry
        friction or a spring, or a link without mass or with data that are not finite.
      FileNotFoundError: no such file.
    """
    model, data, mujoco = _compile(source)
    have = [model.joint(i).name or f"joint{i}" for i in range(model.njnt)]
    wanted = have if joints is None else list(joints)
    missing = [name for name in wanted if name not in have]
    if missing or not wanted:
        raise ValueError(
            f"MJCF: joints {missing or wanted}: expected hinges of the model, which has {have}; name some of these, or add the "
            "missing ones to the model"
        )
    ids = [have.index(name) for name in wanted]
    _check_hinges(model, wanted, ids, mujoco)
    link_of = _links(model, wanted, ids)
    # In the world's frame, at the model's start.
    frames = data.xmat.reshape(-1, 3, 3)
    bodies = [model.jnt_bodyid[j] for j in ids]
    rotations, origins = frames[bodies], data.xanchor[ids]
    befores = np.concatenate([np.eye(3)[None], rotations[:-1]])
    sources = np.concatenate([np.zeros((1, 3)), origins[:-1]])
    axes = np.stack([r.T @ data.xaxis[j] for r, j in zip(rotations, ids, strict=True)])
    start = model.qpos0[model.jnt_qposadr[ids]]
    unturned = [_about(axis, -angle) for axis, angle in zip(axes, start, strict=True)]
    hand = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SITE, "hand")
    held = hand >= 0 and link_of[int(model.site_bodyid[hand])] == len(ids) - 1
    home = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_KEY, "home")
    limited = model.jnt_limited[ids].astype(bool)
    lower = np.where(limited, model.jnt_range[ids, 0], -np.inf)
    upper = np.where(limited, model.jnt_range[ids, 1], np.inf)
    posture = model.key_qpos[home] if home >= 0 else model.qpos0
    return make_arm(
        rotation=np.stack([b.T @ r @ u for b, r, u in zip(befores, rotations, unturned, strict=True)]),
        translation=np.stack([b.T @ (o - s) for b, o, s in zip(befores, origins, sources, strict=True)]),
        axis=axes,
        **_fused(model, data, link_of, rotations, origins),
        armature=model.dof_armature[model.jnt_dofadr[ids]],
        damping=model.dof_damping[model.jnt_dofadr[ids]].reshape(len(ids), -1)[:, 0],
        gravity=model.opt.gravity,
        hand=rotations[-1].T @ (data.site_xpos[hand] - origins[-1]) if held else np.zeros(3),
        home=np.clip(posture[model.jnt_qposadr[ids]], lower, upper),
        lower=lower,
        upper=upper,
        velocity_limit=_velocity_limits(model, ids, mujoco),
        torque_limit=[_torque_limit(model, j, mujoco) for j in ids],
        joint_names=wanted,
    )


def _compile(source: str | os.PathLike[str]) -> tuple[Any, Any, Any]:
    """A compiled model, its data at the start, and MuJoCo."""
    try:
        import mujoco as library
    except ImportError as error:
        raise ImportError("from_mjcf reads models with MuJoCo: install mujoco (it comes with ml3_jax[launch])") from error
    mujoco: Any = library  # compiled, without types
    text = isinstance(source, str) and source.lstrip().startswith("<")
    if not text and not pathlib.Path(source).is_file():
        raise FileNotFoundError(f"MJCF: expected the text of a model or the path of a file, got {os.fspath(source)!r}")
    try:
        read = mujoco.MjModel.from_xml_string if text else mujoco.MjModel.from_xml_path
        model = read(source if text else os.fspath(source))
    except ValueError as error:
        raise ValueError(f"MJCF: MuJoCo rejects the model: {error}") from error
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    mujoco.mj_comPos(model, data)
    return model, data, mujoco


def _check_hinges(model: Any, names: list[str], ids: list[int], mujoco: Any) -> None:
    other = [n for n, j in zip(names, ids, strict=True) if model.jnt_type[j] != mujoco.mjtJoint.mjJNT_HINGE]
    if other:
        raise ValueError(f"MJCF: joints {other}: expected hinges, got other joints; name the arm's hinges with joints=...")
    for name, j in zip(names, ids, strict=True):
        friction, spring = model.dof_frictionloss[model.jnt_dofadr[j]], np.ravel(model.jnt_stiffness[j])[0]
        if friction or spring:
            raise ValueError(
                f"MJCF: joint {name}: expected neither dry friction nor a spring, which the equations of motion here lack, got "
                f"frictionloss {friction:g} and stiffness {spring:g}; remove them from the model"
            )


def _links(model: Any, names: list[str], ids: list[int]) -> list[int]:
    """The link of each body, -1 for the base. Checks that the joints form a chain."""
    joint_link = {int(model.jnt_bodyid[j]): i for i, j in enumerate(ids)}
    if len(joint_link) < len(ids):
        raise ValueError(f"MJCF: joints {names}: expected one hinge per body, got a body with several of them")
    link_of: list[int] = [-1]
    for body in range(1, model.nbody):
        parent = link_of[int(model.body_parentid[body])]
        link = joint_link.get(body, parent)
        if body in joint_link and parent != link - 1:
            before = names[link - 1] if link else "the base"
            raise ValueError(
                f"MJCF: joint {names[link]}: expected it to follow {before}, got it after "
                f"{names[parent] if parent >= 0 else 'the base'}; name the joints of one chain, from the base to the hand"
            )
        link_of.append(link)
    return link_of


def _fused(model: Any, data: Any, link_of: list[int], rotations: np.ndarray, origins: np.ndarray) -> dict[str, np.ndarray]:
    """Mass [n], centre of mass [n, 3] and inertia about it [n, 3, 3] of the bodies of each link, in the link's frame."""
    masses, coms, inertias = [], [], []
    for link, (rotation, origin) in enumerate(zip(rotations, origins, strict=True)):
        bodies = [b for b, of in enumerate(link_of) if of == link]
        weights, places = model.body_mass[bodies], data.xipos[bodies]
        total = weights.sum()
        com = weights @ places / total if total > 0 else origin
        axes, shifts = data.ximat[bodies].reshape(-1, 3, 3), places - com
        second = np.einsum("b,bi,bj->ij", weights, shifts, shifts)
        inertia = np.einsum("bij,bj,bkj->ik", axes, model.body_inertia[bodies], axes) + np.trace(second) * np.eye(3) - second
        masses.append(total)
        coms.append(rotation.T @ (com - origin))
        inertias.append(rotation.T @ inertia @ rotation)
    return {"mass": np.array(masses), "com": np.array(coms), "inertia": np.array(inertias)}


def _velocity_limits(model: Any, ids: list[int], mujoco: Any) -> np.ndarray:
    numeric = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_NUMERIC, "velocity_limit")
    if numeric < 0 or model.numeric_size[numeric] != model.njnt:
        return np.full(len(ids), np.inf)
    values = model.numeric_data[model.numeric_adr[numeric] :][ids]
    return np.where(values > 0, values, np.inf)


def _torque_limit(model: Any, joint: int, mujoco: Any) -> float:
    """Largest torque of the motors at one joint, N m."""
    if model.jnt_actfrclimited[joint]:
        return float(np.abs(model.jnt_actfrcrange[joint]).min())
    limit = math.inf
    for i in range(model.nu):
        if model.actuator_trntype[i] == mujoco.mjtTrn.mjTRN_JOINT and model.actuator_trnid[i, 0] == joint:
            gear = abs(model.actuator_gear[i, 0])
            if model.actuator_forcelimited[i]:
                limit = min(limit, gear * np.abs(model.actuator_forcerange[i]).min())
            plain = model.actuator_biastype[i] == mujoco.mjtBias.mjBIAS_NONE
            if model.actuator_ctrllimited[i] and plain:
                limit = min(limit, gear * abs(model.actuator_gainprm[i, 0]) * np.abs(model.actuator_ctrlrange[i]).min())
    return float(limit)


def rotation_of(quat: np.ndarray) -> np.ndarray:
    """Rotation [3, 3] of a quaternion (w, x, y, z) of any length."""
    w, *vector = quat / np.linalg.norm(quat)
    cross = np.cross(vector, np.eye(3)).T
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross


def _about(axis: np.ndarray, angle: float) -> np.ndarray:
    """Rotation [3, 3] about an axis of length 1."""
    return rotation_of(np.array([math.cos(angle / 2), *(math.sin(angle / 2) * axis)]))


def _quaternion(rotation: np.ndarray) -> np.ndarray:
    """Quaternion (w, x, y, z) of a rotation [3, 3]: the eigenvector of Bar-Itzhack's matrix (2000), exact for every angle."""
    r = rotation
    upper = np.array(
        [
            [r[0, 0] + r[1, 1] + r[2, 2], r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]],
            [0, r[0, 0] - r[1, 1] - r[2, 2], r[0, 1] + r[1, 0], r[0, 2] + r[2, 0]],
            [0, 0, r[1, 1] - r[0, 0] - r[2, 2], r[1, 2] + r[2, 1]],
            [0, 0, 0, r[2, 2] - r[0, 0] - r[1, 1]],
        ]
    )
    return np.linalg.eigh(upper, UPLO="U")[1][:, -1]


def _text(values: Any) -> str:
    return " ".join(repr(float(value)) for value in np.ravel(np.asarray(values, float)))
