"""Control of a system: what the model-based and the model-free experiments share.

An experiment describes its `Robot`. Its family (`model_based.common`, `model_free.common`) makes a problem of it; the
scenarios of its meta-test and the problem that figures record are made here.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import envs
import ml3_jax
from launch.evaluation import pretraining
from launch.experiment import Scenario
from ml3_jax import networks
from ml3_jax.problems import model_learning


def final_distance(env: envs.GoalEnv) -> Callable[[Array, Array], Mapping[str, Array]]:
    """The evaluation of a rollout by its last distance."""
    return lambda states, goal: {"distance": env.distance(states[-1], goal)}


def state_and_goal(env: envs.GoalEnv) -> Callable[[Array, Array], Array]:
    """The policy's input: state and goal as they are."""
    del env
    return lambda x, goal: jnp.concatenate([x, goal])


class Robot(NamedTuple):
    """A system with goals. Functions take a resolved config, an environment or both.

    Attributes:
      make_env: (config, **options) -> the environment; options win over the config.
      objective: (config, env) -> the cost of a rollout (model-based) or the reward of a transition (model-free).
      inputs: env -> ((x, goal) -> [F]), the input of the policy, of size 1 or so.
      evaluate: env -> ((states [T + 1, S], goal) -> {name: scalar}), of one rollout.
      extra: config -> what only the task loss may see.
      features: what a model-based loss sees beside the action.
      state_scale: [S], typical sizes of the state's coordinates, for these features; None: 1.
      policy_activation, policy_bias: of the policy's network, where its config does not say.
      policy_gain: config -> the factor on the policy's output, in action limits.
    """

    make_env: Callable[..., envs.GoalEnv]
    objective: Callable[[Any, envs.GoalEnv], Callable[..., Array]]
    inputs: Callable[[Any], Callable[[Array, Array], Array]] = state_and_goal
    evaluate: Callable[[envs.GoalEnv], Callable[[Array, Array], Mapping[str, Array]]] = final_distance
    extra: Callable[[Any], Any] = lambda config: None
    features: tuple[str, ...] = ("state", "goal")
    state_scale: tuple[float, ...] | None = None
    policy_activation: str = "tanh"
    policy_bias: bool = True
    policy_gain: Callable[[Any], float] = lambda config: 1.0

    def policy_network(self, config: Any, env: envs.GoalEnv) -> networks.MLP:
        """The policy's network: inputs -> one output for each coordinate of the action."""
        return networks.MLP(
            (*config.policy_hidden, env.action_size),
            getattr(config, "policy_activation", self.policy_activation),
            self.policy_bias,
            init_scheme="fan_in",
            last_scale=config.policy_last_scale,
        )


def blank_input(inputs: Callable[[Array, Array], Array], env: envs.GoalEnv) -> Array:
    """The policy's input at state and goal 0: it has the right shape."""
    return inputs(jnp.zeros(env.observation_size), jnp.zeros(env.goal_size))


def scenario(
    problem: ml3_jax.Problem, metric: str, context: Any = None, *, goals: Callable[[Array], Array] | None = None, **fields: Any
) -> Scenario:
    """A scenario whose tasks are starts and goals.

    Args:
      problem: the problem on the tested system.
      metric: of its evaluate.
      context: of the problem.
      goals: key -> goal, where goals are not the problem's.
      **fields: further fields of `Scenario`.
    """

    def sample_tasks(key: Array, count: int) -> Any:
        def one(key: Array) -> Any:
            task = problem.sample_task(key, None)
            return task if goals is None else task.replace(goal=goals(jax.random.fold_in(key, 1)))

        return jax.vmap(one)(jax.random.split(key, count))

    return Scenario(problem, metric, context, sample_tasks, describe=describe, **fields)


def describe(tasks: Any) -> list[dict[str, Any]]:
    """Start, goal and dynamics of each task, where it has them, as JSON values."""
    found = {name: getattr(tasks, name, None) for name in ("start", "goal", "dynamics")}
    columns = {name: np.asarray(leaf).tolist() for name, leaf in found.items() if leaf is not None}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def pretrainer(problem: ml3_jax.Problem, context: Any, **options: Any) -> Callable[[Array], Any]:
    """`Scenario.pretrain`: one policy trained on the meta-train tasks, once for all scenarios that share this function.

    Args:
      problem: the problem of meta-training.
      context: of it.
      **options: num_tasks, steps and learning_rate of `pretraining.pretrain`.
    """
    done: dict[bytes, Any] = {}

    def pretrain(key: Array) -> Any:
        name = np.asarray(jax.random.key_data(key)).tobytes()
        if name not in done:
            done[name] = pretraining.pretrain(problem, context, key, **options)
        return done[name]

    return pretrain


def recording_problem(
    problem: ml3_jax.Problem, env: envs.GoalEnv, act: Callable[[Any, Array, Array], Array], horizon: int
) -> ml3_jax.Problem:
    """The problem with another evaluate: {"states": [T + 1, S]} of one rollout without exploration.

    Args:
      problem: the problem.
      env: the real system.
      act: (params, x [S], goal [G]) -> action [A] in action limits.
      horizon: T.
    """

    def record(params: Any, task: Any, context: Any, key: Array) -> dict[str, Array]:
        del context
        start = env.sample_start(key) if getattr(task, "start", None) is None else task.start

        def policy(x: Array, key: Array) -> Array:
            del key  # no exploration
            return act(params, x, task.goal)

        return {"states": model_learning.real_rollout(env, policy, start, task.goal, key, horizon=horizon).states}

    return problem._replace(evaluate=record)
