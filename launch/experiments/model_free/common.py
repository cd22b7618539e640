"""Model-free control: config, policy, problem and meta-objective. An experiment passes its `Robot` to `definition`."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import envs
import ml3_jax
from launch.config import Config, field
from launch.experiment import PAPER_LOSS, Definition, Experiment, Trained, paper_network
from launch.experiments import control
from launch.experiments.model_free import figures
from ml3_jax import networks
from ml3_jax.problems import model_free

SAMPLED = ("return_to_go", "action", "mean", "std")  # the last columns of every learned loss here
GOALS = ("hidden", "visible")
TRAJECTORIES = ("summary_pull", "summary_gradient", "temporal")  # of `losses.update_rules`; they read trajectories
FULL = {"rollouts": 32, "num_tasks": 64, "meta_steps": 2000, "meta_decay_steps": 2000}  # the paper's sizes
# A network of single samples moves the policy in small steps; the return of an early one shows after several.
PAPER = {"inner_lr": 1e-2, "unroll": 10}
VISIBLE = {"inner_decay_steps": 0, "meta_lr": 3e-3}
LOSSES = (PAPER_LOSS, *TRAJECTORIES, "guided")


@dataclasses.dataclass(frozen=True)
class SamplingConfig(Config):
    """Trajectories, policy and learned loss. One inner step has rollouts * horizon samples."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "visible": VISIBLE,
        "hidden full": FULL,
        "visible full": {**FULL, **VISIBLE},
        "hidden paper": PAPER,
        "visible paper": PAPER,
        "hidden paper full": {**FULL, **PAPER},
        "visible paper full": {**FULL, **PAPER},
    }

    inner_optimizer: str = "adam"
    inner_lr: float = 2e-2
    inner_steps: int = 20
    inner_decay_steps: int = 30  # then the policy stays as it is, for any number of further updates
    unroll: int | None = 5
    meta_lr: float = 1e-3
    meta_steps: int = 800
    meta_decay_steps: int = 800
    meta_clip: float = 1.0
    num_tasks: int = 16
    objective: str = "mean"
    size: str = field("default", choices=("default", "full"))  # full: the sizes of the paper, for a GPU
    goal: str = field("hidden", choices=GOALS)  # hidden: from the policy and the loss, only rewards tell of it
    loss: str | None = field(None, choices=LOSSES)  # None: the best one for hidden goals, "guided" for visible ones
    horizon: int = field(50, at_least=1)
    rollouts: int = field(4, at_least=1)  # of an inner step, of a task loss and of an evaluation
    discount: float = field(1.0, above=0.0, at_most=1.0)
    rest_return_baseline: bool = field(False)  # subtracts the return of staying at the state
    reuse_rollouts: bool = field(False)  # a task loss uses the rollouts of the next update
    action_cost: float = field(0.01, at_least=0.0)  # of each unit of an action, in action limits
    collect_gradient: str = field("cut", choices=ml3_jax.COLLECT_GRADIENTS)  # "score": the unbiased meta-gradient
    hidden: tuple[int, ...] = field((64, 64), at_least=1)  # of the learned loss
    last_scale: float = field(0.1, above=0.0)  # factor on the initial last layer of the learned loss
    activation: str = field("tanh", choices=tuple(sorted(networks.ACTIVATIONS)))  # of the learned loss
    target_scale: float = field(3.0, above=0.0)  # the target at network output 1, in action limits
    target_weight: float | None = field(None, at_least=0.0)  # in the meta-objective, of `target_return`; "guided" alone has it
    target_std: float = field(0.3, above=0.0)  # exploration in `target_return`, in action limits
    policy_hidden: tuple[int, ...] = field((64, 64), at_least=1)
    policy_activation: str = field("tanh", choices=tuple(sorted(networks.ACTIVATIONS)))
    policy_last_scale: float = field(0.1, above=0.0)  # factor on the initial last layer
    policy_std: float = field(0.5, above=0.0)  # at the start, in action limits
    policy_least_std: float = field(0.2, above=0.0)  # the smallest standard deviation
    pretrain_steps: int = field(1000, at_least=1)  # updates of the curve "pretrained_tuned"
    context_steps: int = field(1500, at_least=1)  # updates of the curve "context_policy"
    context_batches: int = field(6, at_least=1)  # inner steps of its lives in training
    ppo_tasks: int | None = field(None, at_least=1, optional=True)  # PPO learns only the first tested tasks; None: all
    ppo_env_steps: int = field(200_000, at_least=1)  # at least; PPO continues until its curve is flat

    def preset(self) -> str:
        """The goals' protocol, the paper's loss and the full size: these change other defaults."""
        return self.goal + " paper" * (self.loss == PAPER_LOSS) + " full" * (self.size == "full")

    def derived(self) -> dict[str, Any]:
        """The learned loss that suits the goals."""
        loss = self.loss or ("summary_pull" if self.goal == "hidden" else "guided")
        return {**super().derived(), "loss": loss, "target_weight": 10.0 if loss == "guided" else 0.0}

    def check(self) -> None:
        """Checks fields against each other."""
        super().check()
        if self.target_weight and self.loss != "guided":
            self._reject("target_weight", 'be 0 unless loss is "guided"', "no other loss has targets of its own")


def near_goal(env: envs.GoalEnv, *, unit: float, height: float, width: float, action_cost: float) -> model_free.RewardFn:
    """R = -d + height / (d + width) - action_cost |a| at the next state.

    d is the distance in `unit`s, and |a| the sum over clipped actions, in action limits.
    """

    def of_transition(x: Array, action: Array, following: Array, goal: Array) -> Array:
        del x
        distance = env.distance(following, goal) / unit
        effort = jnp.sum(jnp.abs(jnp.clip(action, -1.0, 1.0)))
        return -distance + height / (distance + width) - action_cost * effort

    return of_transition


def seen_by(robot: control.Robot, config: Any, env: envs.GoalEnv) -> Callable[[Array, Array], Array]:
    """(x, goal) -> the input of the policy and of the learned loss."""
    if config.goal == "visible":
        return robot.inputs(env)
    assert robot.inputs_without_goal is not None, "the robot of a model-free experiment has such inputs"
    return robot.inputs_without_goal(env)


def make_policy(robot: control.Robot, config: Any, env: envs.GoalEnv) -> model_free.GaussianPolicy:
    """The policy of a config. A network gives the mean; the standard deviation is a parameter with a lower bound."""
    network, inputs = robot.policy_network(config, env), seen_by(robot, config, env)
    if config.policy_std <= config.policy_least_std:
        raise ValueError(
            f"policy_std: expected more than policy_least_std = {config.policy_least_std}, got {config.policy_std}"
        )
    # std = policy_least_std + e^s, and policy_std at the start.
    start = math.log(config.policy_std - config.policy_least_std)

    def init(key: Array) -> Any:
        mean = network.init(key, control.blank_input(inputs, env))
        return {"mean": mean, "log_std": jnp.full(env.action_size, start)}

    def apply(params: Any, x: Array, goal: Array) -> tuple[Array, Array]:
        mean = jnp.asarray(network.apply(params["mean"], inputs(x, goal)))
        return mean, jnp.log(config.policy_least_std + jnp.exp(params["log_std"]))

    return model_free.GaussianPolicy(init, apply)


def make_problem(
    robot: control.Robot,
    config: Any,
    env: envs.GoalEnv,
    *,
    policy: model_free.GaussianPolicy | None = None,
    sample_dynamics: Callable[[Array], Any] | None = None,
    system: Callable[[Any], Any] | None = None,
    extra_loss: Callable[..., Array] | None = None,
) -> ml3_jax.Problem:
    """The problem of a config. Tasks are starts and goals of env; other arguments are those of `model_free.make_problem`."""
    problem = model_free.make_problem(
        env if system is None else system,
        make_policy(robot, config, env) if policy is None else policy,
        model_free.Tasks(
            sample_start=env.sample_start,
            sample_goal=env.sample_goal,
            reward=robot.objective(config, env),
            evaluate=robot.evaluate(env),
            sample_dynamics=sample_dynamics,
            hidden_goal=config.goal == "hidden",
        ),
        model_free.Sampling(
            horizon=config.horizon,
            rollouts=config.rollouts,
            discount=config.discount,
            rest_return_baseline=config.rest_return_baseline,
        ),
        task_loss=model_free.TaskLoss(
            scaled=config.collect_gradient != "score",  # the score function needs the gradient of the value
            reuse_rollouts=config.reuse_rollouts,
            extra_loss=extra_loss,
        ),
        features=features_of(config.loss),
        inputs=seen_by(robot, config, env),
        trajectories=config.loss in TRAJECTORIES,
    )
    return ml3_jax.losses.observe_plain_loss(problem) if config.loss == PAPER_LOSS else problem


def features_of(loss: str) -> tuple[str, ...]:
    """The columns of a learned loss."""
    what_happened = ("time", "next_state", "reward", "credits")
    return ("state", "updates", *(() if loss == "guided" else what_happened), *SAMPLED)


def make_loss(robot: control.Robot, config: Any, env: envs.GoalEnv) -> ml3_jax.LearnedLoss:
    """The learned loss of a config."""
    losses, size = ml3_jax.losses, env.action_size
    if config.loss == PAPER_LOSS:
        return losses.plain_plus(paper_network(config.hidden, config.activation, config.last_scale))
    if config.loss == "guided":
        scales = {"last_scale": config.last_scale, "target_scale": config.target_scale}
        return losses.guided_policy_gradient(size, config.hidden, config.activation, **scales)
    own = jnp.size(control.blank_input(seen_by(robot, config, env), env)) + 1  # and the number of updates
    shared: dict[str, Any] = {"hidden": config.hidden, "activation": config.activation, "last_scale": config.last_scale}
    if config.loss == "summary_pull":
        return losses.summary_pull(size, own, target_scale=config.target_scale, **shared)
    return {"summary_gradient": losses.summary_gradient, "temporal": losses.temporal}[config.loss](size, own, **shared)


def target_return(robot: control.Robot, config: Any, env: envs.GoalEnv, extra_loss: Any) -> Callable[..., Array]:
    """An auxiliary loss: the task loss of a policy with the targets of the learned loss as its mean.

    A converged inner loop would end at this policy. The meta-gradient through the inner loop spans one segment of updates;
    this term needs no inner step.
    """
    inputs, size, loss = seen_by(robot, config, env), env.action_size, make_loss(robot, config, env)
    num_inputs = jnp.size(control.blank_input(inputs, env)) + 1
    target = loss.target
    assert target is not None

    def act(loss_params: Any, x: Array, goal: Array) -> tuple[Array, Array]:
        converged = jnp.ones(1)  # the limit of the feature "updates", k / (k + 1)
        mean = target(loss_params, jnp.concatenate([inputs(x, goal), converged]))
        return mean, jnp.full(size, math.log(config.target_std))

    def init(key: Array) -> Any:
        return loss.init(key, num_inputs + 3 * size + 1)

    policy = model_free.GaussianPolicy(init, act)
    problem = make_problem(robot, config, env, policy=policy, extra_loss=extra_loss)

    def auxiliary_loss(loss_params: Any, task: Any, context: Any, key: Array) -> Array:
        return config.target_weight * problem.task_loss(loss_params, task, context, key)

    return auxiliary_loss


def check_rewards(problem: ml3_jax.Problem) -> ml3_jax.Problem:
    """Returns the problem if the rewards of a random policy are finite.

    Raises:
      ValueError: a reward is not finite; the message gives its step and rollout.
    """
    collect = problem.collect
    assert collect is not None

    @jax.jit  # operation by operation, the ant's rollout would take 300 compilations
    def rewards_of(key: Array) -> Array:
        task = problem.sample_task(key, None)
        return collect(problem.init(key, task), task, None, key, jnp.zeros((), jnp.int32)).samples.rewards

    rewards = np.asarray(rewards_of(jax.random.key(0)))
    bad = np.argwhere(~np.isfinite(rewards))
    if len(bad):
        rollout, time = bad[0]
        raise ValueError(
            f"rewards: expected finite numbers, got {rewards[rollout, time]} at step {time} of rollout {rollout} of a random "
            "policy: look at the reward and at the environment's steps"
        )
    return problem


def env_steps(experiment: Experiment, meta_steps: int) -> int:
    """Environment steps of all inner steps and task losses of meta-training."""
    config, samples = experiment.config, experiment.problem.samples_per_step
    assert samples is not None
    losses = config.unroll if config.objective == "mean" else 1
    if experiment.context is not None:
        losses = 0  # the task loss uses demonstrations
    elif experiment.problem.reused_rollout_loss is not None and config.objective == "mean":
        losses = 1  # rollouts are reused
    if config.target_weight and experiment.context is None:
        losses += 1  # for `target_return`
    return meta_steps * config.num_tasks * samples * (config.unroll + losses)


def definition(
    name: str,
    summary: str,
    config: type[SamplingConfig],
    robot: control.Robot,
    scenarios: control.Scenarios,
    *,
    extra_loss: Callable[[Any], Callable[..., Array] | None] = lambda config: None,
    make_context: Callable[[Any], Any] = lambda config: None,
    **figure_env: Any,
) -> Definition:
    """The definition of an experiment.

    `extra_loss` is config -> the task loss with demonstrations, or None for the policy gradient. Figures show the system with
    the options `figure_env` of `robot.make_env`.
    """

    def make_checked_problem(config: Any) -> ml3_jax.Problem:
        return check_rewards(make_problem(robot, config, robot.make_env(config), extra_loss=extra_loss(config)))

    def meta_options(config: Any) -> dict[str, Any]:
        env, weighted = robot.make_env(config), config.target_weight > 0
        auxiliary = target_return(robot, config, env, extra_loss(config)) if weighted else None
        return {"collect_gradient": config.collect_gradient, "auxiliary_loss": auxiliary}

    def draw(trained: Trained, folder: pathlib.Path) -> None:
        config = trained.experiment.config
        env = robot.make_env(config, **figure_env)
        policy, problem = make_policy(robot, config, env), make_problem(robot, config, env)

        def act(params: Any, x: Array, goal: Array) -> Array:
            return policy.apply(params, x, goal)[0]

        recorded = control.recording_problem(problem, env, act, config.horizon)
        # Without the context, goals are new: demonstrations are for meta-training alone.
        figures.draw(trained._replace(experiment=trained.experiment._replace(context=None)), recorded, env, folder)

    return Definition(
        name,
        summary,
        config,
        make_problem=make_checked_problem,
        make_loss=lambda config: make_loss(robot, config, robot.make_env(config)),
        scenarios=scenarios,
        make_context=make_context,
        meta_options=meta_options,
        figures=draw,
        env_steps=env_steps,
    )
