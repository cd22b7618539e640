"""What an expert does: trajectory optimisation through a system's equations, for problems whose task loss clones it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

import envs
from ml3_jax.problems import model_free

STARTS, STEPS, STEP_SIZE = 8, 300, 0.1  # from how many draws of actions Adam starts, for how many steps, of which size
# What a change of an action by its limit costs, from one step to the next. Without it the best actions jump between the limits,
# which no policy can clone.
ROUGHNESS = 1.0


class Expert(struct.PyTreeNode):
    """One way to a goal, of T steps: the best of all starts of the optimiser."""

    states: Array  # [T, S] where it acted
    actions: Array  # [T, A] in action limits
    total: Array  # [] its return


def optimise(env: envs.GoalEnv, reward: model_free.RewardFn, start: Array, goal: Array, key: Array, *, horizon: int) -> Expert:
    """The actions that bring one start to one goal with the largest return, by Adam from several draws.

    Args:
      env: a system whose dynamics have a gradient.
      reward: of a transition, of actions in limits.
      start: [S].
      goal: [G].
      key: of the draws that Adam starts from.
      horizon: T.

    Returns:
      The best of `STARTS`.
    """

    def follow(actions: Array) -> tuple[Array, Array]:
        def step(x: Array, action: Array) -> tuple[Array, tuple[Array, Array]]:
            following = env.dynamics(x, env.action_limit * action)
            return following, (x, reward(x, action, following, goal))

        _, (states, rewards) = jax.lax.scan(step, start, actions)
        return jnp.sum(rewards), states

    optimizer = optax.adam(optax.cosine_decay_schedule(STEP_SIZE, STEPS))

    def ascend(raw: Array) -> Array:
        # tanh keeps actions inside the limits, where clipping would have no gradient.
        def cost(raw: Array) -> Array:
            actions = jnp.tanh(raw)
            return ROUGHNESS * jnp.sum((actions[1:] - actions[:-1]) ** 2) - follow(actions)[0]

        slope = jax.grad(cost)

        def update(carry: tuple[Array, optax.OptState], _: None) -> tuple[tuple[Array, optax.OptState], None]:
            raw, state = carry
            updates, state = optimizer.update(slope(raw), state)
            return (jnp.asarray(optax.apply_updates(raw, updates)), state), None

        (raw, _), _ = jax.lax.scan(update, (raw, optimizer.init(raw)), None, length=STEPS)
        return raw

    draws = 0.3 * jax.random.normal(key, (STARTS, 1, env.action_size))
    found = jax.vmap(ascend)(jnp.broadcast_to(draws, (STARTS, horizon, env.action_size)))
    totals, states = jax.vmap(lambda raw: follow(jnp.tanh(raw)))(found)
    best = jnp.argmax(totals)
    return Expert(states[best], jnp.tanh(found[best]), totals[best])


def demonstrations(
    env: envs.GoalEnv,
    reward: model_free.RewardFn,
    key: Array,
    *,
    goals: int,
    starts: int,
    horizon: int,
    sample_start: Callable[[Array], Array],
) -> model_free.Demonstrations:
    """Experts from several starts to each of some goals.

    Args:
      env: as of `optimise`; its `sample_goal` draws the goals.
      reward: of a transition.
      key: a typed key.
      goals: E.
      starts: how many for each goal.
      horizon: T.
      sample_start: key -> [S].

    Returns:
      Demonstrations whose extra is an Expert with leaves [E, starts, T, ...].
    """

    @jax.jit
    def of_goal(key: Array) -> tuple[Array, Expert]:
        goal_key, start_key, draw_key = jax.random.split(key, 3)
        goal = env.sample_goal(goal_key)
        begin = jax.vmap(sample_start)(jax.random.split(start_key, starts))

        def one(start: Array, key: Array) -> Expert:
            return optimise(env, reward, start, goal, key, horizon=horizon)

        return goal, jax.vmap(one)(begin, jax.random.split(draw_key, starts))

    drawn, found = jax.lax.map(of_goal, jax.random.split(key, goals), batch_size=16)
    return model_free.Demonstrations(drawn, found)
