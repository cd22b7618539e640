"""A learned dynamics model: an ensemble of networks that predict the change of a state, fitted to recorded rollouts.

The functions are for one transition. `functools.partial(ensemble.predict, model)` is a `step_fn` for
`ml3_jax.rollout.rollout`; `ensemble.fit` takes the `ml3_jax.replay.ReplayBuffer` that a problem's refresh fills.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from ml3_jax import aliases, networks, replay
from ml3_jax.arguments import check_count
from ml3_jax.types import Params

# Soft bounds of the log-variance of a normalised target, the initial ones of PETS (Chua et al. 2018, arXiv:1805.12114).
# Without the lower bound, a deterministic system drives the variance to zero and the likelihood to infinity.
LOG_VARIANCE_BOUNDS = (-10.0, 0.5)
NLL_STEPS = 100  # a fit reports the mean loss of its last steps
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
    """The learned model: networks and the statistics of their training data."""

    params: Params  # [E, ...] of each member's network
    inputs: Normalizer  # [I + A] of features and action
    targets: Normalizer  # [D] of the predicted change


class ModelErrors(struct.PyTreeNode):
    """Prediction errors on held-out rollouts, in units; NaN while the buffer has no held-out rollout."""

    one_step_error: jax.Array  # [S] root mean square over held-out transitions, of each coordinate
    horizon_error: jax.Array  # [] error_against_time at the end of the horizon
    error_against_time: jax.Array  # [T] root mean square over coordinates and rollouts, open loop, after 1, ..., T steps
    coordinate_error: jax.Array  # [T, S] the same of each coordinate
    held_out_rollouts: jax.Array  # [] int32, rollouts in these means


class FitMetrics(ModelErrors):
    """The loss of a fit, and the errors after it."""

    train_nll: jax.Array  # [] nats a transition, of normalised targets, mean over the last steps and members


class Ensemble(NamedTuple):
    """A dynamics model as pure functions, built by `make_ensemble`.

    Attributes:
      init: (key) -> model, untrained, its normalisers the identity.
      fit: (model, buffer, key) -> (model, FitMetrics), compiled. An empty buffer leaves the model unchanged.
      predict: (model, x [S], action [A]) -> [S], the next state by the mean of the members' predicted changes.
      evaluate: (model, buffer) -> ModelErrors of the held-out rollouts, compiled.
    """

    init: Callable[[jax.Array], DynamicsModel]
    fit: Callable[[DynamicsModel, replay.ReplayBuffer, jax.Array], tuple[DynamicsModel, FitMetrics]]
    predict: Callable[[DynamicsModel, jax.Array, jax.Array], jax.Array]
    evaluate: Callable[[DynamicsModel, replay.ReplayBuffer], ModelErrors]


def gaussian_nll(mean: jax.Array, log_variance: jax.Array, target: jax.Array) -> jax.Array:
    """Negative log-likelihood under a diagonal Gaussian, in nats, summed over coordinates: three [..., D] -> [...]."""
    squares = (target - mean) ** 2 * jnp.exp(-log_variance)
    return 0.5 * jnp.sum(squares + log_variance + math.log(2 * math.pi), axis=-1)


def bounded_log_variance(raw: jax.Array) -> jax.Array:
    """A network's output, softly bounded to `LOG_VARIANCE_BOUNDS` by two softplus; a gradient leads back. Any shape."""
    low, high = LOG_VARIANCE_BOUNDS
    below = high - jax.nn.softplus(high - raw)
    return low + jax.nn.softplus(below - low)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitting:
    """How networks are fitted.

    Attributes:
      learning_rate: Adam's, a number or a schedule over the steps of one fit.
      batch_size: transitions in a member's mini-batch.
      steps: gradient steps of a fit.
      held_out: the fraction of the buffer's slots that are never trained on, in (0, 1).
    """

    learning_rate: optax.ScalarOrSchedule = 1e-3
    batch_size: int = 256
    steps: int = 1000
    held_out: float = 0.1


@aliases.accept_old_keywords("make_ensemble", fitting=Fitting)
def make_ensemble(
    state_size: int,
    action_size: int,
    *,
    members: int = 3,
    hidden: Sequence[int] = (100, 30),
    fitting: Fitting = Fitting(),
    predicts: str = "state",
    dt: float | None = None,
    state_limits: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Ensemble:
    """An ensemble of probabilistic networks that learns a state's change over one step.

    Each member predicts mean and log-variance of the normalised change. It maximises its Gaussian likelihood on mini-batches of
    its own, drawn uniformly with replacement from all training transitions. Every fit takes the same number of gradient steps.
    It starts from the given networks, with the new data's statistics, a fresh Adam state and log-variance heads of zero.

    Rollouts in the buffer must be finite: see `ml3_jax.rollout.check_finite`. Angles are inputs as they are, unwrapped.

    Args:
      state_size: S.
      action_size: A.
      members: E, networks.
      hidden: units of a network's hidden layers.
      fitting: how networks are fitted.
      predicts: "state" predicts the change of x. "velocity" takes x as halves (q, v) and predicts the change of v alone:
        v' = v + dv, q' = q + dt v' (semi-implicit Euler).
      dt: seconds a step, for "velocity".
      state_limits: (low [S], high [S]), the range of the next state, infinite in a coordinate without limit. The gradient of a
        clipped coordinate is zero. None clips nothing.

    Returns:
      An Ensemble.

    Raises:
      ValueError: a count below 1, a fraction outside (0, 1), an unknown name, "velocity" without `dt` or with an odd
        state, or limits that do not fit the state.

    Source: Chua et al., Deep Reinforcement Learning in a Handful of Trials using Probabilistic Dynamics Models, 2018,
    arXiv:1805.12114, sec. 4.
    """
    counts = {"state_size": state_size, "action_size": action_size, "members": members, "batch_size": fitting.batch_size}
    for name, count in (*counts.items(), ("steps", fitting.steps)):
        check_count(name, count)
    if not 0 < fitting.held_out < 1:
        raise ValueError(f"held_out: expected a fraction between 0 and 1, both excluded, got {fitting.held_out}")
    limits = _limits(state_limits, state_size)
    seconds = dt if predicts == "velocity" else None
    parts = _Networks(
        state_size, action_size, members, tuple(hidden), _change_size(predicts, dt, state_size), seconds, limits, fitting
    )
    return Ensemble(parts.init, jax.jit(parts.fit), parts.predict, jax.jit(parts.evaluate))


@dataclasses.dataclass(frozen=True, eq=False)
class _Networks:
    """The functions of the Ensemble."""

    state_size: int
    action_size: int
    members: int
    hidden: tuple[int, ...]
    change_size: int  # D
    seconds: float | None  # a step, if the velocity is predicted
    limits: tuple[np.ndarray, np.ndarray] | None  # [S], [S]
    fitting: Fitting

    @property
    def both_heads(self) -> networks.MLP:
        """Mean and log-variance, [N, S + A] -> [N, 2 D]."""
        return networks.MLP((*self.hidden, 2 * self.change_size), activation="tanh")

    def init(self, key: jax.Array) -> DynamicsModel:
        sizes = (self.state_size + self.action_size, self.change_size)
        keys = jax.random.split(key, self.members)
        params = jax.vmap(self.both_heads.init, in_axes=(0, None))(keys, jnp.zeros(sizes[0]))
        inputs, targets = (Normalizer(jnp.zeros(size), jnp.ones(size)) for size in sizes)
        return DynamicsModel(params, inputs, targets)

    def predict(self, model: DynamicsModel, x: jax.Array, action: jax.Array) -> jax.Array:
        if x.shape != (self.state_size,) or action.shape != (self.action_size,):
            raise ValueError(
                f"predict: expected a state [{self.state_size}] and an action [{self.action_size}], got {x.shape} and "
                f"{action.shape}: it is written for one transition, vmap it over others"
            )
        mean_head = networks.MLP((*self.hidden, self.change_size), activation="tanh")
        params = _mean_head_params(model.params, len(self.hidden), self.change_size)
        inputs = model.inputs.apply(jnp.concatenate([x, action]))
        changes = jnp.asarray(jax.vmap(mean_head.apply, in_axes=(0, None))(params, inputs))  # [E, D]
        return self.moved(x, model.targets.invert(jnp.mean(changes, axis=0)))

    def moved(self, x: jax.Array, change: jax.Array) -> jax.Array:
        """The next state, from a change [D] in units."""
        if self.seconds is None:
            x = x + change
        else:
            q, v = jnp.split(x, 2)
            v = v + change
            x = jnp.concatenate([q + self.seconds * v, v])
        return x if self.limits is None else jnp.clip(x, *(limit.astype(x.dtype) for limit in self.limits))

    def fit(self, model: DynamicsModel, buffer: replay.ReplayBuffer, key: jax.Array) -> tuple[DynamicsModel, FitMetrics]:
        _check_buffer(buffer, self.state_size, self.action_size)
        slots, _ = replay.split_slots(buffer.states.shape[0], self.fitting.held_out)
        states, actions = buffer.states[slots], buffer.actions[slots]
        # Slots fill in ascending order, so the valid transitions are the first ones.
        valid = jnp.sum(jnp.asarray(slots) < buffer.count) * actions.shape[1]
        inputs = jnp.concatenate([_flat(states[:, :-1]), _flat(actions)], axis=-1)
        targets = (_flat(states[:, 1:]) - _flat(states[:, :-1]))[:, self.state_size - self.change_size :]
        of_inputs, of_targets = _normalizers(inputs, targets, valid)
        inputs, targets = jax.vmap(of_inputs.apply)(inputs), jax.vmap(of_targets.apply)(targets)
        params, losses = self.descend(model.params, inputs, targets, valid, key)
        fitted = DynamicsModel(params, of_inputs, of_targets)
        fitted = jax.tree.map(lambda new, old: jnp.where(valid > 0, new, old), fitted, model)
        nll = jnp.where(valid > 0, jnp.mean(losses[-NLL_STEPS:]), jnp.nan)
        return fitted, FitMetrics(**vars(self.evaluate(fitted, buffer)), train_nll=nll)

    def descend(
        self, params: Params, inputs: jax.Array, targets: jax.Array, valid: jax.Array, key: jax.Array
    ) -> tuple[Params, jax.Array]:
        """Adam on mini-batches of the first `valid` normalised rows: (params, mean loss of each step)."""
        optimizer = optax.adam(self.fitting.learning_rate)

        def loss(params: Params, inputs: jax.Array, targets: jax.Array) -> jax.Array:
            """One member's on its mini-batch: [N, S + A], [N, D] -> []."""
            mean, raw = jnp.split(jnp.asarray(self.both_heads.apply(params, inputs)), 2, axis=-1)
            return jnp.mean(gaussian_nll(mean, bounded_log_variance(raw), targets))

        def step(carry: tuple[Params, optax.OptState], key: jax.Array) -> tuple[tuple[Params, optax.OptState], jax.Array]:
            params, opt_state = carry
            drawn = jax.random.randint(key, (self.members, self.fitting.batch_size), 0, jnp.maximum(valid, 1))
            losses, gradients = jax.vmap(jax.value_and_grad(loss))(params, inputs[drawn], targets[drawn])
            updates, opt_state = optimizer.update(gradients, opt_state)
            return (optax.apply_updates(params, updates), opt_state), jnp.mean(losses)

        # The variances start anew: a network that was certain of its few first rollouts weighs an error by up to exp(10), and
        # learns new data worse than a fresh network.
        params = _variance_head_reset(params, len(self.hidden), self.change_size)
        keys = jax.random.split(key, self.fitting.steps)
        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return params, losses

    def evaluate(self, model: DynamicsModel, buffer: replay.ReplayBuffer) -> ModelErrors:
        _check_buffer(buffer, self.state_size, self.action_size)
        _, slots = replay.split_slots(buffer.states.shape[0], self.fitting.held_out)
        predict = functools.partial(self.predict, model)

        def follow(x: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
            x = predict(x, action)
            return x, x

        def of_rollout(states: jax.Array, actions: jax.Array) -> tuple[jax.Array, jax.Array]:
            one_step = jax.vmap(predict)(states[:-1], actions)
            _, open_loop = jax.lax.scan(follow, states[0], actions)
            return (one_step - states[1:]) ** 2, (open_loop - states[1:]) ** 2

        squares = jax.vmap(of_rollout)(buffer.states[slots], buffer.actions[slots])
        filled = jnp.asarray(slots) < buffer.count
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


def _limits(limits: tuple[Sequence[float], Sequence[float]] | None, state_size: int) -> tuple[np.ndarray, np.ndarray] | None:
    if limits is None:
        return None
    low, high = map(np.asarray, limits)
    if low.shape != (state_size,) or high.shape != (state_size,) or not np.all(low < high):
        raise ValueError(
            f"state_limits: expected (low, high), each [{state_size}], with low < high (infinite without a limit), got "
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
    """Every member's network without log-variances: the first half of the last layer."""
    last = f"Dense_{layers}"
    return {"params": {**params["params"], last: jax.tree.map(lambda leaf: leaf[..., :size], params["params"][last])}}


def _variance_head_reset(params: Params, layers: int, size: int) -> Params:
    """Every member's network with constant log-variances: zeros in the second half of the last layer."""
    last = f"Dense_{layers}"
    head = jax.tree.map(lambda leaf: leaf.at[..., size:].set(0), params["params"][last])
    return {"params": {**params["params"], last: head}}


def _normalizers(inputs: jax.Array, targets: jax.Array, valid: jax.Array) -> tuple[Normalizer, Normalizer]:
    """Statistics of the first `valid` rows.

    An input that does not vary keeps its unit: with a tiny scale, a later deviation would become huge. A target that does not
    vary has the floor as its scale and is predicted as constant.
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
