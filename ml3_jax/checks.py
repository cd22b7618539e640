"""The checks of meta-training: features keep their shape, and the first meta-gradient is finite."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ml3_jax.inner import trace_features
from ml3_jax.types import Context, MetaState, Metrics, Params, Problem, Task


class NotFiniteError(ValueError):
    """The first meta-gradient of a training is not finite, or explodes."""


class ShapeCheck:
    """Remembers the first feature shapes for arguments of given shapes, and refuses other ones later."""

    def __init__(self, problem: Problem):
        self._expected: dict[str, Any] = {}
        self.problem = problem._replace(observe=self._observe)
        self._raw = problem

    def expect(self, params: Params, task: Task, context: Context, key: jax.Array) -> Any:
        """The shapes that observe returns at the first inner step; later ones must be equal."""
        return trace_features(self.problem, params, task, context, key)

    def _observe(self, params: Params, task: Task, context: Context, key: jax.Array, step: jax.Array) -> Any:
        features = self._raw.observe(params, task, context, key, step)
        came = jax.tree.map(jnp.shape, features)
        seen = str(jax.tree.map(jnp.shape, (params, task, context)))
        expected = self._expected.setdefault(seen, came)
        if came != expected:
            raise ValueError(
                f"observe changed the shape of its features: {expected} when the learned loss was initialised, "
                f"{came} now; it must return the same shapes at every inner step"
            )
        return features


class FirstStepCheck:
    """Raises if the first meta-step of a training is skipped. It reads concrete values, once.

    A training resumed at a later meta-step has passed the check: it skips a step that is not finite.
    """

    def __init__(self, max_norm: float):
        self._done, self._max_norm = False, max_norm

    def applies_to(self, state: MetaState) -> bool:
        """Whether the next step is the first; ask before the step, which may donate the state's memory."""
        return not self._done and not isinstance(state.step, Tracer) and not np.any(np.asarray(state.step))

    def check(self, metrics: Metrics, is_first: bool) -> None:
        """Checks the metrics of a step, of many, or of many for several seeds; `is_first` is the answer of `applies_to`.

        Raises:
          NotFiniteError: it was the first step, and its meta-gradient is not finite.
        """
        if self._done or isinstance(metrics.skipped, Tracer):
            return
        skipped = _first_steps(metrics.skipped)
        if is_first and skipped.any():
            raise NotFiniteError(_not_finite(metrics, int(np.argmax(skipped)), self._max_norm))
        self._done = True


def _first_steps(metric: jax.Array) -> np.ndarray:
    """[S], a metric of the first meta-step of each seed, from [], [num_steps] or [S, num_steps]."""
    return np.atleast_2d(np.asarray(metric))[:, 0]


def _not_finite(metrics: Metrics, seed: int, max_norm: float) -> str:
    value, norm = (float(_first_steps(x)[seed]) for x in (metrics.task_loss, metrics.meta_grad_norm))
    if not np.isfinite(value):
        return (
            f"the task loss after the first inner steps is {value}: the inner loop diverges; expected a finite number. "
            "Lower the inner step size, or look for a task loss or an observe that is not finite"
        )
    if np.isfinite(norm):
        return (
            f"the meta-gradient of the first meta-step has norm {norm:.3g}; expected at most max_meta_grad_norm = "
            f"{max_norm:.3g}: it explodes. Scale the task loss down, shorten the unroll or lower the inner step size"
        )
    return (
        f"the meta-gradient of the first meta-step has norm {norm}; expected a finite number. The inner optimizer is the "
        "usual cause: Adam, RMSProp and the like take the square root of a second moment, and its derivative is infinite "
        "at a zero gradient. Give them eps_root > 0, for example optax.adam(learning_rate, eps_root=1e-8)"
    )
