"""Control of a system with goals: shared by the model-based and the model-free experiments.

An experiment describes its `Robot`. `model_based.common` or `model_free.common` builds the problem from it.
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
from launch.experiment import Experiment, Scenario
from ml3_jax import networks
from ml3_jax.problems import model_learning

Scenarios = Callable[[Experiment], dict[str, Scenario]]


def env_factory(name: str, *fields: str, **fixed: Any) -> Callable[..., envs.GoalEnv]:
    """A `Robot.make_env`: the environment of a name with options from these config fields and fixed options."""

    def make_env(config: Any, **options: Any) -> envs.GoalEnv:
        return envs.make(name, **{**fixed, **{field: getattr(config, field) for field in fields}, **options})

    return make_env


def final_distance(name: str) -> Callable[[envs.GoalEnv], Callable[[Array, Array], Mapping[str, Array]]]:
    """A `Robot.evaluate`: the distance of the last state, under this name."""
    return lambda env: lambda states, goal: {name: env.distance(states[-1], goal)}


class Robot(NamedTuple):
    """A system with goals. Functions take a resolved config, an environment or both.

    Attributes:
      make_env: (config, **options) -> the environment; options win over the config.
      objective: (config, env) -> the cost of a rollout (model-based) or the reward of a transition (model-free).
      inputs: env -> ((x [S], goal [G]) -> [F]), the input of the policy, scaled to about 1.
      inputs_without_goal: as inputs, for a policy from which the goal is hidden; None: no experiment hides it.
      evaluate: env -> ((states [T + 1, S], goal [G]) -> {name: scalar}), of one rollout.
      extra: config -> information for the task loss alone.
      features: input of a model-based loss, beside the action.
      state_scale: [S] typical sizes of the state's coordinates, for a model-based loss.
      policy_activation, policy_bias: of the policy's network, if its config has no such field.
      policy_gain: config -> the factor on the policy's output, in action limits.
    """

    make_env: Callable[..., envs.GoalEnv]
    objective: Callable[[Any, envs.GoalEnv], Callable[..., Array]]
    inputs: Callable[[Any], Callable[[Array, Array], Array]]
    evaluate: Callable[[envs.GoalEnv], Callable[[Array, Array], Mapping[str, Array]]] = final_distance("distance")
    extra: Callable[[Any], Any] = lambda config: None
    features: tuple[str, ...] = ("state", "goal")
    state_scale: tuple[float, ...] = ()
    policy_activation: str = "tanh"
    policy_bias: bool = True
    policy_gain: Callable[[Any], float] = lambda config: 1.0
    inputs_without_goal: Callable[[Any], Callable[[Array, Array], Array]] | None = None

    def policy_network(self, config: Any, env: envs.GoalEnv) -> networks.MLP:
        """The policy's network, with one output for each coordinate of the action."""
        return networks.MLP(
            (*config.policy_hidden, env.action_size),
            getattr(config, "policy_activation", self.policy_activation),
            self.policy_bias,
            init_scheme="fan_in",
            last_scale=config.policy_last_scale,
        )


def blank_input(inputs: Callable[[Array, Array], Array], env: envs.GoalEnv) -> Array:
    """Zeros of the shape [F] and dtype of the policy's input."""
    seen = jax.eval_shape(inputs, jnp.zeros(env.observation_size), jnp.zeros(env.goal_size))
    return jnp.zeros(seen.shape, seen.dtype)


def scenario(
    problem: ml3_jax.Problem, metric: str, context: Any = None, *, goals: Callable[[Array], Array] | None = None, **fields: Any
) -> Scenario:
    """A `Scenario` with starts and goals as tasks. `goals`, key -> goal, replaces the goals of the problem."""

    def sample_tasks(key: Array, count: int) -> Any:
        def one(key: Array) -> Any:
            task = problem.sample_task(key, None)
            return task if goals is None else task.replace(goal=goals(jax.random.fold_in(key, 1)))

        return jax.vmap(one)(jax.random.split(key, count))

    return Scenario(problem, metric, context, sample_tasks, describe=describe, **fields)


def describe(tasks: Any) -> list[dict[str, Any]]:
    """Start, goal and dynamics of each task as JSON values. Fields that tasks lack are left out."""
    found = {name: getattr(tasks, name, None) for name in ("start", "goal", "dynamics")}
    columns = {name: np.asarray(leaf).tolist() for name, leaf in found.items() if leaf is not None}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def pretrainer(problem: ml3_jax.Problem, context: Any, **options: Any) -> Callable[[Array], Any]:
    """A `Scenario.pretrain` with a cache: scenarios that share it train one policy. Arguments: see `pretraining.pretrain`."""
    return pretraining.cached(lambda key: pretraining.pretrain(problem, context, key, **options))


def recording_problem(
    problem: ml3_jax.Problem, env: envs.GoalEnv, act: Callable[[Any, Array, Array], Array], horizon: int
) -> ml3_jax.Problem:
    """The problem with another evaluate: {"states": [T + 1, S]} of one rollout on env without exploration.

    `act` is (params, x [S], goal [G]) -> action [A] in action limits.
    """

    def record(params: Any, task: Any, context: Any, key: Array) -> dict[str, Array]:
        del context
        start = env.sample_start(key) if getattr(task, "start", None) is None else task.start

        def policy(x: Array, key: Array) -> Array:
            del key
            return act(params, x, task.goal)

        return {"states": model_learning.real_rollout(env, policy, start, task.goal, key, horizon=horizon).states}

    return problem._replace(evaluate=record)
