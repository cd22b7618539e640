"""A learned dynamics model: an ensemble of networks that predict how a state changes, fitted to recorded rollouts.

Written for one transition; `functools.partial(ensemble.predict, model)` is a `step_fn` for `ml3_jax.rollout.rollout`, and
`ensemble.fit` takes the `ml3_jax.replay.ReplayBuffer` that a problem's refresh fills.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from ml3_jax import networks, replay
from ml3_jax.types import Params

# Soft bounds of the log-variance of a normalised target, where PETS (Chua et al. 2018, arXiv:1805.12114) starts its own.
# Without the lower one a deterministic system drives the variance to zero and the likelihood to infinity.
LOG_VARIANCE_BOUNDS = (-10.0, 0.5)
NLL_STEPS = 100  # the last steps of a fit whose mean loss it reports
STD_FLOOR = 1e-5


class Normalizer(struct.PyTreeNode):
    """Shifts and scales coordinates of D to mean 0 and standard deviation 1."""

    mean: jax.Array  # [D]
    std: jax.Array  # [D]

    def apply(self, x: jax.Array) -> jax.Array:
        """[D] in units -> [D] normalised."""
        return (x - self.mean) / self.std

    def invert(self, x: jax.Array) -> jax.Array:
        """[D] normalised -> [D] in units."""
        return self.mean + self.std * x


class DynamicsModel(struct.PyTreeNode):
    """What is learned: networks and the statistics of the data they were fitted to."""

    params: Params  # [E, ...] of each member's network
    inputs: Normalizer  # [I + A] of features and action
    targets: Normalizer  # [D] of the predicted change


class ModelErrors(struct.PyTreeNode):
    """How far predictions are from held-out rollouts, in units; NaN while none is in the buffer."""

    one_step_error: jax.Array  # [S] root mean square over held-out transitions, of each coordinate
    horizon_error: jax.Array  # [] error_against_time at the end of the horizon
    error_against_time: jax.Array  # [T] root mean square over coordinates and rollouts, open loop, after 1, ..., T steps
    coordinate_error: jax.Array  # [T, S] the same of each coordinate
    held_out_rollouts: jax.Array  # [] int32, how many rollouts these are means over


class FitMetrics(ModelErrors):
    """What a fit reports: its loss, and the errors after it."""

    train_nll: jax.Array  # [] nats a transition, of normalised targets, mean over the last steps and members


class Ensemble(NamedTuple):
    """A dynamics model as pure functions, built by `make_ensemble`.

    Attributes:
      init: (key) -> model, untrained, its normalisers the identity.
      fit: (model, buffer, key) -> (model, FitMetrics), compiled. An empty buffer leaves the model as it was.
      predict: (model, x [S], action [A]) -> [S], the next state by the mean of the members' predicted changes.
      predict_members: (model, x [S], action [A]) -> [E, S], the next state by each member.
      evaluate: (model, buffer) -> ModelErrors of the held-out rollouts, compiled.
    """

    init: Callable[[jax.Array], DynamicsModel]
    fit: Callable[[DynamicsModel, replay.ReplayBuffer, jax.Array], tuple[DynamicsModel, FitMetrics]]
    predict: Callable[[DynamicsModel, jax.Array, jax.Array], jax.Array]
    predict_members: Callable[[DynamicsModel, jax.Array, jax.Array], jax.Array]
    evaluate: Callable[[DynamicsModel, replay.ReplayBuffer], ModelErrors]


def gaussian_nll(mean: jax.Array, log_variance: jax.Array, target: jax.Array) -> jax.Array:
    """Negative log-likelihood under a diagonal Gaussian, in nats, summed over coordinates: three [..., D] -> [...]."""
    squares = (target - mean) ** 2 * jnp.exp(-log_variance)
    return 0.5 * jnp.sum(squares + log_variance + math.log(2 * math.pi), axis=-1)


def bounded_log_variance(raw: jax.Array) -> jax.Array:
    """A network's output bent into `LOG_VARIANCE_BOUNDS` by two softplus, so that a gradient brings it back; any shape."""
    low, high = LOG_VARIANCE_BOUNDS
    below = high - jax.nn.softplus(high - raw)
    return low + jax.nn.softplus(below - low)


def make_ensemble(
    state_size: int,
    action_size: int,
    *,
    members: int = 3,
    hidden: Sequence[int] = (100, 30),
    activation: str = "tanh",
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    batch_size: int = 256,
    fit_steps: int = 1000,
    held_out: float = 0.1,
    predicts: str = "state",
    dt: float | None = None,
    state_limits: tuple[Sequence[float], Sequence[float]] | None = None,
    features_fn: Callable[[jax.Array], jax.Array] | None = None,
) -> Ensemble:
    """An ensemble of probabilistic networks that learns a state's change over one step.

    Each member predicts mean and log-variance of the normalised change and maximises its Gaussian likelihood on
    mini-batches of its own, drawn uniformly with replacement from all training transitions. A fit takes the same number of
    gradient steps however full the buffer is. It goes on from the given networks, normalised by the new data's statistics,
    with a fresh Adam state and the heads of the log-variances set to zero; carried over, these would do harm.

    Rollouts in the buffer have to be finite: see `ml3_jax.rollout.check_finite`. One that is not makes the fitted model
    NaN, unless it is held out. Angles are taken as they are, unwrapped; `features_fn` may turn them to sines and cosines.

    Args:
      state_size: S.
      action_size: A.
      members: E, networks.
      hidden: units of a network's hidden layers.
      activation: a name in `ml3_jax.networks.ACTIVATIONS`.
      learning_rate: Adam's, a number or a schedule over the steps of one fit.
      batch_size: transitions in a member's mini-batch.
      fit_steps: gradient steps a fit takes.
      held_out: the fraction of the buffer's slots whose rollouts are never trained on, in (0, 1).
      predicts: "state" predicts the change of x. "velocity" takes x as halves (q, v) and predicts the change of v alone:
        v' = v + dv, q' = q + dt v' (semi-implicit Euler).
      dt: seconds a step, for "velocity".
      state_limits: (low [S], high [S]), what the next state is clipped to, infinite where a coordinate has none. Where it
        is clipped its gradient is zero. None clips nothing.
      features_fn: x [S] -> [I], what networks see of a state; None is the state itself.

    Returns:
      An Ensemble.

    Raises:
      ValueError: a count below 1, a fraction outside (0, 1), an unknown name, "velocity" without `dt` or with an odd
        state, or limits that do not fit the state.

    Source: Chua et al., Deep Reinforcement Learning in a Handful of Trials using Probabilistic Dynamics Models, 2018,
    arXiv:1805.12114, sec. 4.
    """
    counts = {"state_size": state_size, "action_size": action_size, "members": members, "batch_size": batch_size}
    for name, count in (*counts.items(), ("fit_steps", fit_steps)):
        if count < 1:
            raise ValueError(f"{name}: expected at least 1, got {count}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a fraction between 0 and 1, both excluded, got {held_out}")
    networks.activation_fn(activation)
    low, high = _limits(state_limits, state_size)
    change_size = _change_size(predicts, dt, state_size)
    seconds = 0.0 if dt is None else dt
    features = features_fn if features_fn is not None else _identity
    input_size = jax.eval_shape(features, jax.ShapeDtypeStruct((state_size,), jnp.zeros(()).dtype)).shape[0] + action_size
    both_heads = networks.MLP((*hidden, 2 * change_size), activation=activation)
    mean_head = networks.MLP((*hidden, change_size), activation=activation)
    optimizer = optax.adam(learning_rate)

    def init(key: jax.Array) -> DynamicsModel:
        params = jax.vmap(both_heads.init, in_axes=(0, None))(jax.random.split(key, members), jnp.zeros(input_size))
        inputs, targets = (Normalizer(jnp.zeros(size), jnp.ones(size)) for size in (input_size, change_size))
        return DynamicsModel(params, inputs, targets)

    def input_of(x: jax.Array, action: jax.Array) -> jax.Array:
        return jnp.concatenate([features(x), action])

    def change_between(x: jax.Array, following: jax.Array) -> jax.Array:
        return (following - x)[state_size - change_size :]

    def moved(x: jax.Array, change: jax.Array) -> jax.Array:
        if predicts == "velocity":
            q, v = jnp.split(x, 2)
            v = v + change
            x = jnp.concatenate([q + seconds * v, v])
        else:
            x = x + change
        return x if state_limits is None else jnp.clip(x, low.astype(x.dtype), high.astype(x.dtype))

    def member_changes(model: DynamicsModel, x: jax.Array, action: jax.Array) -> jax.Array:
        """Each member's mean change, normalised: [E, D]."""
        if x.shape != (state_size,) or action.shape != (action_size,):
            raise ValueError(
                f"predict: expected a state [{state_size}] and an action [{action_size}], got {x.shape} and {action.shape}: "
                "it is written for one transition, vmap it over others"
            )
        params = _mean_head_params(model.params, len(hidden), change_size)
        return jnp.asarray(jax.vmap(mean_head.apply, in_axes=(0, None))(params, model.inputs.apply(input_of(x, action))))

    def predict(model: DynamicsModel, x: jax.Array, action: jax.Array) -> jax.Array:
        return moved(x, model.targets.invert(jnp.mean(member_changes(model, x, action), axis=0)))

    def predict_members(model: DynamicsModel, x: jax.Array, action: jax.Array) -> jax.Array:
        changes = member_changes(model, x, action)
        return jax.vmap(lambda change: moved(x, model.targets.invert(change)))(changes)

    def loss(params: Params, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        """One member's on its mini-batch, normalised: [N, I + A], [N, D] -> []."""
        mean, raw = jnp.split(jnp.asarray(both_heads.apply(params, inputs)), 2, axis=-1)
        return jnp.mean(gaussian_nll(mean, bounded_log_variance(raw), targets))

    def fit(model: DynamicsModel, buffer: replay.ReplayBuffer, key: jax.Array) -> tuple[DynamicsModel, FitMetrics]:
        _check_buffer(buffer, state_size, action_size)
        slots, _ = replay.split_slots(buffer.states.shape[0], held_out)
        states, actions = buffer.states[slots], buffer.actions[slots]
        # Slots fill in ascending order, so that the valid transitions are the first ones.
        valid = jnp.sum(jnp.asarray(slots) < buffer.count) * actions.shape[1]
        inputs = jax.vmap(input_of)(_flat(states[:, :-1]), _flat(actions))
        targets = jax.vmap(change_between)(_flat(states[:, :-1]), _flat(states[:, 1:]))
        of_inputs, of_targets = _normalizers(inputs, targets, valid)
        inputs, targets = jax.vmap(of_inputs.apply)(inputs), jax.vmap(of_targets.apply)(targets)

        def descend(carry: tuple[Params, optax.OptState], key: jax.Array) -> tuple[tuple[Params, optax.OptState], jax.Array]:
            params, opt_state = carry
            drawn = jax.random.randint(key, (members, batch_size), 0, jnp.maximum(valid, 1))
            losses, gradients = jax.vmap(jax.value_and_grad(loss))(params, inputs[drawn], targets[drawn])
            updates, opt_state = optimizer.update(gradients, opt_state)
            return (optax.apply_updates(params, updates), opt_state), jnp.mean(losses)

        # Variances start anew: a network that was sure of its few first rollouts weighs an error by up to exp(10), and learns
        # wider data worse than one that starts from nothing.
        params = _variance_head_reset(model.params, len(hidden), change_size)
        start = (params, optimizer.init(params))
        (params, _), losses = jax.lax.scan(descend, start, jax.random.split(key, fit_steps))
        fitted = DynamicsModel(params, of_inputs, of_targets)
        fitted = jax.tree.map(lambda new, old: jnp.where(valid > 0, new, old), fitted, model)
        nll = jnp.where(valid > 0, jnp.mean(losses[-NLL_STEPS:]), jnp.nan)
        return fitted, FitMetrics(**vars(evaluate(fitted, buffer)), train_nll=nll)

    def evaluate(model: DynamicsModel, buffer: replay.ReplayBuffer) -> ModelErrors:
        _check_buffer(buffer, state_size, action_size)
        _, slots = replay.split_slots(buffer.states.shape[0], held_out)
        states, actions = buffer.states[slots], buffer.actions[slots]
        filled = jnp.asarray(slots) < buffer.count

        def follow(x: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
            x = predict(model, x, action)
            return x, x

        def of_rollout(states: jax.Array, actions: jax.Array) -> tuple[jax.Array, jax.Array]:
            one_step = jax.vmap(lambda x, action: predict(model, x, action))(states[:-1], actions)
            _, open_loop = jax.lax.scan(follow, states[0], actions)
            return (one_step - states[1:]) ** 2, (open_loop - states[1:]) ** 2

        squares = jax.vmap(of_rollout)(states, actions)
        rollouts = jnp.sum(filled)
        kept = (jnp.where(filled[:, None, None], square, 0) for square in squares)
        one_step, open_loop = (jnp.sum(square, axis=0) / rollouts for square in kept)  # [T, S]
        against_time = jnp.sqrt(jnp.mean(open_loop, axis=-1))
        return ModelErrors(
            one_step_error=jnp.sqrt(jnp.mean(one_step, axis=0)),
            horizon_error=against_time[-1],
            error_against_time=against_time,
            coordinate_error=jnp.sqrt(open_loop),
            held_out_rollouts=rollouts,
        )

    return Ensemble(init, jax.jit(fit), predict, predict_members, jax.jit(evaluate))


def _identity(x: jax.Array) -> jax.Array:
    return x


def _flat(rows: jax.Array) -> jax.Array:
    """[R, T, D] -> [R * T, D]."""
    return rows.reshape(-1, rows.shape[-1])


def _change_size(predicts: str, dt: float | None, state_size: int) -> int:
    if predicts == "state":
        return state_size
    if predicts != "velocity":
        raise ValueError(f"predicts: expected 'state' or 'velocity', got {predicts!r}")
    if dt is None or dt <= 0:
        raise ValueError(f"dt: expected the seconds of a step, for predicts='velocity', got {dt}")
    if state_size % 2:
        raise ValueError(f"state_size: expected an even number for predicts='velocity', halves (q, v), got {state_size}")
    return state_size // 2


def _limits(limits: tuple[Sequence[float], Sequence[float]] | None, state_size: int) -> tuple[np.ndarray, np.ndarray]:
    low, high = (np.full(state_size, -np.inf), np.full(state_size, np.inf)) if limits is None else map(np.asarray, limits)
    if low.shape != (state_size,) or high.shape != (state_size,) or not np.all(low < high):
        raise ValueError(
            f"state_limits: expected (low, high), each [{state_size}], with low < high (infinite where there is none), got "
            f"{low} and {high}"
        )
    return low, high


def _check_buffer(buffer: replay.ReplayBuffer, state_size: int, action_size: int) -> None:
    found = (buffer.states.shape[-1], buffer.actions.shape[-1])
    if found != (state_size, action_size):
        raise ValueError(
            f"buffer: expected states of {state_size} and actions of {action_size} coordinates, got {found[0]} and {found[1]}"
        )


def _mean_head_params(params: Params, layers: int, size: int) -> Params:
    """Every member's network without its log-variances: the last layer's first half."""
    last = f"Dense_{layers}"
    return {"params": {**params["params"], last: jax.tree.map(lambda leaf: leaf[..., :size], params["params"][last])}}


def _variance_head_reset(params: Params, layers: int, size: int) -> Params:
    """Every member's network with the same log-variance everywhere: zeros in the last layer's second half."""
    last = f"Dense_{layers}"
    head = jax.tree.map(lambda leaf: leaf.at[..., size:].set(0), params["params"][last])
    return {"params": {**params["params"], last: head}}


def _normalizers(inputs: jax.Array, targets: jax.Array, valid: jax.Array) -> tuple[Normalizer, Normalizer]:
    """Statistics of the first `valid` rows.

    An input that does not vary keeps its unit, lest a small deviation later becomes a huge one; a target that does not vary
    has the floor as its scale, and is predicted as constant.
    """
    (mean, std), (target_mean, target_std) = _statistics(inputs, valid), _statistics(targets, valid)
    return (
        Normalizer(mean, jnp.where(std > STD_FLOOR, std, 1)),
        Normalizer(target_mean, jnp.maximum(target_std, STD_FLOOR)),
    )


def _statistics(rows: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the first `valid` rows: [N, D] -> [D], [D]."""
    kept = (jnp.arange(rows.shape[0]) < valid)[:, None]
    count = jnp.maximum(valid, 1)
    mean = jnp.sum(jnp.where(kept, rows, 0), axis=0) / count
    squares = jnp.where(kept, rows - mean[None], 0) ** 2
    return mean, jnp.sqrt(jnp.sum(squares, axis=0) / count)
