"""What meta-training refuses: features that change their shape, and a first meta-step whose meta-gradient is not finite."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ml3_jax.inner import trace_features
from ml3_jax.types import Context, MetaState, Metrics, Params, Problem, Task


class ShapeGuard:
    """Remembers the shape of what observe returned first, for arguments of the same shapes, and refuses another one later."""

    def __init__(self, problem: Problem):
        self._expected: dict[str, Any] = {}
        self.problem = problem._replace(observe=self._observe)
        self._raw = problem

    def expect(self, params: Params, task: Task, context: Context, key: jax.Array) -> Any:
        """The shapes that observe returns at the first inner step; from now on they are what it must return."""
        return trace_features(self.problem, params, task, context, key)

    def _observe(self, params: Params, task: Task, context: Context, key: jax.Array, step: jax.Array) -> Any:
        features = self._raw.observe(params, task, context, key, step)
        came = jax.tree.map(jnp.shape, features)
        seen = str(jax.tree.map(jnp.shape, (params, task, context)))
        expected = self._expected.setdefault(seen, came)
        if came != expected:
            raise ValueError(
                f"observe changed the shape of what it returns: {expected} when the learned loss was initialised, "
                f"{came} now; it must return the same shapes at every inner step"
            )
        return features


class FirstStepCheck:
    """Raises if the first meta-step of a training has no finite meta-gradient; looks at concrete values alone, once.

    A training that goes on from a later meta-step has passed it: there a step that is not finite is skipped, as it would be
    had the training not stopped.
    """

    def __init__(self):
        self._done = False

    def __call__(self, function: Callable[..., tuple[MetaState, Metrics]]) -> Callable[..., tuple[MetaState, Metrics]]:
        @functools.wraps(function)
        def checked(state: MetaState, *args: int) -> tuple[MetaState, Metrics]:
            # Looked at before the call, which may take the state's memory over.
            first = not self._done and not isinstance(state.step, Tracer) and int(state.step) == 0
            after, metrics = function(state, *args)
            if not self._done and not isinstance(metrics.skipped, Tracer):
                if first and np.ravel(metrics.skipped)[0]:
                    raise ValueError(_not_finite(metrics))
                self._done = True
            return after, metrics

        return checked


def _not_finite(metrics: Metrics) -> str:
    value, norm = (float(np.ravel(x)[0]) for x in (metrics.task_loss, metrics.meta_grad_norm))
    if not np.isfinite(value):
        return (
            f"the task loss after the first inner steps is {value}: the inner loop diverges; expected a finite number. "
            "Lower the inner step size, or look for a task loss or an observe that is not finite"
        )
    return (
        f"the meta-gradient of the first meta-step has norm {norm}; expected a finite number. The inner optimizer is the "
        "usual cause: Adam, RMSProp and the like take the square root of a second moment, whose derivative is infinite "
        "where a gradient is zero. Give them eps_root > 0, for example optax.adam(learning_rate, eps_root=1e-8)"
    )
