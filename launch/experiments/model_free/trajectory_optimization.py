"""Expert demonstrations by trajectory optimisation through the equations of a system."""

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

import envs
from ml3_jax.problems import model_free

STARTS, STEPS, STEP_SIZE = 8, 300, 0.1  # initial draws of actions, steps of Adam, its step size
# Cost of an action's squared change between steps, in limits. Without it the best actions jump between the limits, and no
# policy can clone them.
ROUGHNESS = 1.0


class Expert(struct.PyTreeNode):
    """One trajectory of T steps to a goal: the best of all initial draws."""

    states: Array  # [T, S] before each action
    actions: Array  # [T, A] in action limits
    total: Array  # [] return


def optimise(env: envs.GoalEnv, reward: model_free.RewardFn, start: Array, goal: Array, key: Array, *, horizon: int) -> Expert:
    """The trajectory from start [S] to goal [G] with the largest return, by Adam from `STARTS` draws of actions.

    `env` needs differentiable dynamics; `reward` is that of a transition, with actions in limits.
    """

    def follow(actions: Array) -> tuple[Array, Array]:
        def step(x: Array, action: Array) -> tuple[Array, tuple[Array, Array]]:
            following = env.dynamics(x, env.action_limit * action)
            return following, (x, reward(x, action, following, goal))

        _, (states, rewards) = jax.lax.scan(step, start, actions)
        return jnp.sum(rewards), states

    optimizer = optax.adam(optax.cosine_decay_schedule(STEP_SIZE, STEPS))

    def ascend(raw: Array) -> Array:
        # tanh keeps actions within the limits; clipping would have no gradient there.
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
    env: envs.GoalEnv, reward: model_free.RewardFn, key: Array, *, goals: int, starts: int, horizon: int
) -> model_free.Demonstrations:
    """Demonstrations of E = `goals` goals of env. Their extra is an `Expert` with leaves [E, starts, T, ...]."""

    @jax.jit
    def of_goal(key: Array) -> tuple[Array, Expert]:
        goal_key, start_key, draw_key = jax.random.split(key, 3)
        goal = env.sample_goal(goal_key)
        begin = jax.vmap(env.sample_start)(jax.random.split(start_key, starts))

        def one(start: Array, key: Array) -> Expert:
            return optimise(env, reward, start, goal, key, horizon=horizon)

        return goal, jax.vmap(one)(begin, jax.random.split(draw_key, starts))

    drawn, found = jax.lax.map(of_goal, jax.random.split(key, goals), batch_size=16)
    return model_free.Demonstrations(drawn, found)
