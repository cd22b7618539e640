"""The arm of `envs.reacher` in Brax's mjx pipeline, from the project's own MJCF file: an independent simulator.

It is about 300 times slower than the closed form and has no gradient. `envs.make("reacher", physics="mjx")` builds it.
"""

import copy
import pathlib
from typing import Any
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
from brax.io import mjcf
from brax.mjx import pipeline

from envs.base import State, quiet_brax
from envs.reacher import Reacher

MODEL = pathlib.Path(__file__).parent / "assets" / "reacher.xml"


class ReacherMjx(Reacher):
    """`Reacher` with the same options, and with MuJoCo's soft joint limits."""

    differentiable = False
    backend = "mjx"

    def __init__(self, **options: Any):
        """Sets the options of `Reacher` and loads the model with them.

        Raises:
          ValueError: an option out of its range.
          TypeError: an unknown option.
        """
        super().__init__(**options)
        with quiet_brax():
            self._system = mjcf.loads(self.mjcf())

    def mjcf(self) -> str:
        """The model as MJCF, with this environment's gear, armature and damping."""
        root = ElementTree.fromstring(MODEL.read_text(encoding="utf-8"))
        joint, motor = root.find("default/joint"), root.find("default/motor")
        assert joint is not None
        assert motor is not None
        joint.set("armature", repr(self.armature))
        joint.set("damping", repr(self.damping))
        motor.set("gear", repr(self.gear))
        return ElementTree.tostring(root, encoding="unicode")

    def with_gear(self, gear: jax.Array) -> "ReacherMjx":
        """The same arm with other motors; see `Reacher.with_gear`."""
        changed = copy.copy(self)
        changed.gear = gear
        gears = jnp.asarray(self._system.actuator_gear).at[:, 0].set(gear)
        changed._system = self._system.replace(actuator_gear=gears)
        return changed

    def dynamics(self, x: jax.Array, action: jax.Array) -> jax.Array:
        """Not available.

        Raises:
          NotImplementedError: always.
        """
        raise NotImplementedError(
            "reacher with physics='mjx' has no differentiable dynamics: use step, or physics='closed_form' for dynamics"
        )

    def _pipeline_state(self, x: jax.Array) -> Any:
        with quiet_brax():
            return pipeline.init(self._system, x[:2], x[2:], ctrl=jnp.zeros(2))

    def _advance(self, state: State, action: jax.Array) -> tuple[Any, jax.Array]:
        before: Any = state.pipeline_state
        with quiet_brax():
            after: Any = pipeline.step(self._system, before, self._clipped(action))
        return after, jnp.concatenate([after.q, after.qd])
