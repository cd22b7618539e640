"""Rollouts: a policy and a step function of a learned dynamics model or a simulator become a `Trajectory` in one scan.

The functions are written for one rollout; `vmap` adds the axis of rollouts B. `step_fn` may be
`functools.partial(ensemble.predict, model)` of `ml3_jax.dynamics` or the step of any environment. `check_finite` checks the
result.
"""

import math
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ml3_jax.types import PyTree

PolicyFn = Callable[[PyTree, jax.Array], PyTree]  # (observation, key) -> action
TransitionFn = Callable[[PyTree, PyTree], PyTree]  # (state, action) -> next state


class Trajectory(struct.PyTreeNode):
    """One rollout of T steps: actions[t] led from states[t] to states[t + 1]."""

    states: PyTree  # [T + 1, ...] the record of each state, index 0 the start
    actions: PyTree  # [T, ...]


def rollout(
    policy_fn: PolicyFn,
    step_fn: TransitionFn,
    state: PyTree,
    key: jax.Array,
    *,
    horizon: int,
    observation_fn: Callable[[PyTree], PyTree] | None = None,
    record_fn: Callable[[PyTree], PyTree] | None = None,
    detach_states: bool = False,
) -> Trajectory:
    """Runs a policy for a fixed number of steps; differentiable if `step_fn` and `policy_fn` are.

    Args:
      policy_fn: (observation, key) -> action, any pytree. Every step has a key of its own.
      step_fn: (state, action) -> state, any pytree whose shapes and dtypes do not change: a vector, or a simulator's state.
      state: the start.
      key: one typed key.
      horizon: T, environment steps.
      observation_fn: state -> the policy's observation; None: the state itself (`lambda s: s.obs` for a Brax state).
      record_fn: state -> the trajectory's record of it; None: the observation. A simulator's state holds contacts and inertias
        that would fill memory T + 1 times, so ask for more by name (`lambda s: (s.obs, s.reward)`).
      detach_states: no gradient flows along the states, neither through `step_fn` nor into the start. Recorded states are
        constants. Each action depends on the policy's parameters directly, at the visited state.

    Returns:
      A Trajectory with states [T + 1, ...] and actions [T, ...].

    Raises:
      ValueError: a horizon that is not a whole number of at least 1.
    """
    if not isinstance(horizon, numbers.Integral) or horizon < 1:
        raise ValueError(
            f"horizon: expected a whole number of steps, at least 1, got {horizon!r}: a rollout of no step has no action; "
            "give the number of steps as a Python int"
        )
    observe = observation_fn if observation_fn is not None else _identity
    record = record_fn if record_fn is not None else observe

    def visited(state: PyTree) -> PyTree:
        # Cuts the gradient along the states (through step_fn, into the start): the policy then learns from its actions
        # alone, as on a system without derivative.
        return jax.lax.stop_gradient(state) if detach_states else state

    def act(state: PyTree, key: jax.Array) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        action = policy_fn(observe(state), key)
        return visited(step_fn(state, action)), (record(state), action)

    last, (states, actions) = jax.lax.scan(act, visited(state), jax.random.split(key, int(horizon)))
    return Trajectory(jax.tree.map(_append, states, record(last)), actions)


def rollout_along(
    policy_fn: PolicyFn,
    model_step_fn: TransitionFn,
    states: PyTree,
    key: jax.Array,
) -> Trajectory:
    """A recorded rollout with the values of the real system and the derivatives of a model along it.

    The gradient of stochastic value gradients: x_{t+1} = x^real_{t+1} + m(x_t, a_t) - [m(x_t, a_t)] with the bracket held
    constant, so that dx_{t+1} = dm/dx dx_t + dm/da da_t at the states that the real system visited, and the model's error
    does not add up along the horizon. Derivatives of every order are the model's.

    Args:
      policy_fn: (state, key) -> action, the recorded policy: its actions are computed again, with their gradient.
      model_step_fn: (state, action) -> state, the model that gives the Jacobians.
      states: [T + 1, ...] visited by the real system; no gradient reaches them.
      key: the key of the recorded `rollout`; the policy then repeats its actions.

    Returns:
      A Trajectory with the real states [T + 1, ...] and the policy's actions [T, ...] at them.

    Raises:
      ValueError: fewer than two states.

    Source: Heess et al., Learning Continuous Control Policies by Stochastic Value Gradients, 2015, arXiv:1510.09142, sec. 4.
    """
    steps = min(leaf.shape[0] for leaf in jax.tree.leaves(states)) - 1
    if steps < 1:
        raise ValueError(f"states: expected [T + 1, ...] with T at least 1, got {steps + 1} states: record a step or more")
    # Cuts the gradient into the recording: the real system has no derivative here.
    states = jax.lax.stop_gradient(states)

    def act(state: PyTree, step: tuple[PyTree, jax.Array]) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        real, key = step
        action = policy_fn(state, key)
        predicted = model_step_fn(state, action)
        # Cuts one of two equal terms, so that the model's value cancels (to exactly zero) and its derivative stays.
        held = jax.lax.stop_gradient(predicted)
        following = jax.tree.map(lambda x, moving, fixed: x + (moving - fixed), real, predicted, held)
        return following, (following, action)

    start = jax.tree.map(lambda x: x[0], states)
    real = jax.tree.map(lambda x: x[1:], states)
    _, (followed, actions) = jax.lax.scan(act, start, (real, jax.random.split(key, steps)))
    return Trajectory(jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, followed), actions)


def check_finite(trajectory: Trajectory, name: str) -> None:
    """Raises an error at the first state or action that is not finite, in any rollout of a batch.

    It reads values on the host, so call it outside `jit`, on the result of a compiled rollout.

    Args:
      trajectory: states [T + 1, S] and actions [T, A], or any number of batch axes before these. The first leaf of the states
        has the shape [..., T + 1, S].
      name: the environment's, for the message.

    Raises:
      ValueError: a state or an action is not finite. The message names the environment, the rollout, the step, the state
        before it and the action that led there.
    """
    shape = np.shape(jax.tree.leaves(trajectory.states)[0])
    axes = max(0, len(shape) - 2)
    batch = shape[:axes]
    states, actions = (_rows(tree, axes) for tree in (trajectory.states, trajectory.actions))
    bad_states, bad_actions = (~np.all(np.isfinite(rows), axis=-1) for rows in (states, actions))
    broken = np.any(bad_states, axis=1) | np.any(bad_actions, axis=1)
    if not np.any(broken):
        return
    index = int(np.argmax(broken))
    which = f"rollout {', '.join(str(int(i)) for i in np.unravel_index(index, batch))}: " if batch else ""
    if not np.any(bad_states[index]):
        step = int(np.argmax(bad_actions[index]))
        found = f"the action of step {step} is not finite, {actions[index, step]}, at state {states[index, step]}"
        advice = "look at the policy's parameters (a smaller inner step size, a bounded last layer)"
    elif (step := int(np.argmax(bad_states[index]))) == 0:
        found = f"the state it starts from is not finite, {states[index, 0]}"
        advice = "look at how the start is drawn"
    else:
        found = (
            f"the state of step {step} is not finite, {states[index, step]}; before it the state was "
            f"{states[index, step - 1]} and the action {actions[index, step - 1]}"
        )
        advice = "bound the actions, shorten the time step, or lower the inner step size that made this policy"
    raise ValueError(f"{name}: {which}{found}: {advice}")


def _identity(state: PyTree) -> PyTree:
    return state


def _append(rows: jax.Array, row: jax.Array) -> jax.Array:
    return jnp.concatenate([rows, row[None]])


def _rows(tree: PyTree, axes: int) -> np.ndarray:
    """[*batch, T, ...] leaves as one array [prod(batch), T, all coordinates]."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    rows = [leaf.reshape(math.prod(leaf.shape[:axes]), leaf.shape[axes], -1) for leaf in leaves]
    return np.concatenate(rows, axis=-1)
