"""The curve "context_policy": one policy that reads all earlier transitions and rewards of its task, and never changes.

It has seen the meta-train tasks, as the learned loss has. It is trained by the policy gradient over lives of several batches on
one task: a network encodes each transition, the mean of the codes so far is an input of the policy. This is the idea of RL^2
(Duan et al. 2016, arXiv:1611.02779) with the permutation-invariant memory of PEARL (Rakelly et al. 2019, arXiv:1903.08254).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import envs
import ml3_jax
from launch.evaluation import pretraining
from launch.experiments import control
from launch.experiments.model_free import common
from ml3_jax import networks, sharding
from ml3_jax.problems import model_free

CODE = 32  # numbers in the code of a transition
HIDDEN = (64, 64)
LEARNING_RATE = 1e-3
CLIP = 1.0  # of the gradient's global norm


class Memory(NamedTuple):
    """What a policy has seen of its task."""

    total: Array  # [CODE] sum of the codes of all transitions
    count: Array  # []


class ContextPolicy(NamedTuple):
    """The policy as pure functions; weights: {"encoder", "mean", "log_std"}."""

    problem: ml3_jax.Problem  # its params are (weights, code)
    init: Callable[[Array], Any]  # key -> weights
    live: Callable[..., tuple[Array, Mapping[str, Array]]]  # see `make`


def make(robot: control.Robot, config: Any, env: envs.GoalEnv) -> ContextPolicy:
    """The policy for the tasks of a config.

    `live` is (weights, task, key, batches, evaluated=True) -> (mean loss of the batches, {METRIC: [batches + 1]}): a life on
    one task. Each batch is `rollouts` trajectories, as in an inner step; evaluation j comes before batch j.
    """
    inputs = common.seen_by(robot, config, env)
    encoder = networks.MLP((HIDDEN[0], CODE), "tanh", init_scheme="lecun")
    network = networks.MLP((*HIDDEN, env.action_size), "tanh", init_scheme="lecun", last_scale=config.policy_last_scale)
    blank = control.blank_input(inputs, env)
    start = math.log(config.policy_std - config.policy_least_std)

    def init(key: Array) -> Any:
        keys = jax.random.split(key)
        transition = jnp.zeros(2 * blank.size + env.action_size + 1)
        return {
            "encoder": encoder.init(keys[0], transition),
            "mean": network.init(keys[1], jnp.concatenate([blank, jnp.zeros(CODE + 1)])),
            "log_std": jnp.full(env.action_size, start),
        }

    def apply(params: Any, x: Array, goal: Array) -> tuple[Array, Array]:
        weights, code = params
        mean = jnp.asarray(network.apply(weights["mean"], jnp.concatenate([inputs(x, goal), code])))
        return mean, jnp.log(config.policy_least_std + jnp.exp(weights["log_std"]))

    policy = model_free.GaussianPolicy(lambda key: (init(key), jnp.zeros(CODE + 1)), apply)
    problem = common.make_problem(robot, config, env, policy=policy)
    collect, plain_loss = problem.collect, problem.plain_loss
    assert collect is not None
    assert plain_loss is not None

    def code_of(memory: Memory) -> Array:
        """The mean code, and whether there is any."""
        return jnp.append(memory.total / jnp.maximum(memory.count, 1.0), jnp.sign(memory.count))

    def remember(weights: Any, memory: Memory, samples: model_free.Samples) -> Memory:
        goal = jnp.zeros(env.goal_size)
        seen = jax.vmap(jax.vmap(lambda x: inputs(x, goal)))(samples.states)
        parts = [seen[:, :-1], samples.actions, samples.rewards[..., None], seen[:, 1:]]
        rows = jnp.concatenate(parts, axis=-1).reshape(samples.rewards.size, -1)
        codes = jnp.tanh(jnp.asarray(encoder.apply(weights["encoder"], rows)))
        return Memory(memory.total + jnp.sum(codes, axis=0), memory.count + codes.shape[0])

    def live(weights: Any, task: Any, key: Array, batches: int, evaluated: bool = True) -> tuple[Array, Mapping[str, Array]]:
        def metrics(memory: Memory) -> Mapping[str, Array]:
            return problem.evaluate((weights, code_of(memory)), task, None, key) if evaluated else {}

        def batch(memory: Memory, number: Array) -> tuple[Memory, Any]:
            own, at = jax.random.fold_in(key, number), metrics(memory)
            params = (weights, code_of(memory))
            data = collect(params, task, None, own, number)  # constants: sampling cuts the gradient
            loss = plain_loss(params, data, None, own, number)
            return remember(weights, memory, data.samples), (loss, at)

        memory, (losses, found) = jax.lax.scan(batch, Memory(jnp.zeros(CODE), jnp.zeros(())), jnp.arange(batches))
        last = metrics(memory)
        return jnp.mean(losses), {name: jnp.append(values, last[name]) for name, values in found.items()}

    return ContextPolicy(problem, init, live)


def train(policy: ContextPolicy, key: Array, *, num_tasks: int, batches: int, steps: int) -> Any:
    """Weights after `steps` updates by Adam, each over a life of `batches` batches on each of `num_tasks` fresh tasks."""
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps)))

    def gradient_over(keys: Array, weights: Any, context: Any) -> tuple[tuple[Array, None], Any]:
        del context

        def of_task(weights: Any, key: Array) -> Array:
            task_key, life_key = jax.random.split(key)
            return policy.live(weights, policy.problem.sample_task(task_key, None), life_key, batches, False)[0]

        value, gradient = jax.value_and_grad(lambda weights: jnp.mean(jax.vmap(of_task, (None, 0))(weights, keys)))(weights)
        return (value, None), gradient

    mean_gradient = sharding.mean_over_devices(gradient_over, sharding.mesh_for(num_tasks))

    @jax.jit
    def run(key: Array) -> Any:
        def update(carry: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], None]:
            weights, opt_state = carry
            _, gradient = mean_gradient(jax.random.split(key, num_tasks), weights, None)
            updates, opt_state = optimizer.update(gradient, opt_state, weights)
            return (optax.apply_updates(weights, updates), opt_state), None

        init_key, run_key = jax.random.split(key)
        weights = policy.init(init_key)
        (weights, _), _ = jax.lax.scan(update, (weights, optimizer.init(weights)), jax.random.split(run_key, steps))
        return weights

    return sharding.uncommit(run(key))


def curves(policy: ContextPolicy, weights: Any, tasks: Any, keys: Array, batches: int) -> dict[str, np.ndarray]:
    """{METRIC: [M, batches + 1]} of lives on tasks [M, ...]."""
    lives = jax.jit(jax.vmap(lambda task, key: policy.live(weights, task, key, batches)[1]))(tasks, keys)
    return {name: np.asarray(values, dtype=np.float64) for name, values in lives.items()}


def rival(robot: control.Robot, config: Any, env: envs.GoalEnv) -> Callable[[Array], Callable[..., Mapping[str, np.ndarray]]]:
    """A rival of `launch.experiment.Scenario`. Scenarios that share it train one policy for each key."""
    policy = make(robot, config, env)

    def trained(key: Array) -> Any:
        return train(policy, key, num_tasks=config.num_tasks, batches=config.context_batches, steps=config.context_steps)

    weights = pretraining.cached(trained)
    return lambda key: lambda tasks, keys, steps: curves(policy, weights(key), tasks, keys, steps)
