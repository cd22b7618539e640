"""The interfaces that everything else composes: a problem, a learned loss, a meta-learner and the state it carries.

A `Problem` and a `LearnedLoss` go into `ml3_jax.make_meta_learner`, which returns a `MetaLearner`. `ml3_jax.adapt` and
`ml3_jax.baseline` return an `Adaptation`. Axes: M tasks, N samples, F features, C classes, A action dimensions.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import optax
from flax import struct

from ml3_jax import aliases

PyTree = Any
Params = Any  # theta, the parameters of the optimizee
LossParams = Any  # phi, the parameters of the learned loss
OptimizerParams = Any  # of a learned inner optimizer
Phi = Any  # all that is meta-learned: LossParams alone if that is the loss, else a `MetaParams`
Task = Any
Context = Any

GRADIENT_MODES = ("mixed", "nested", "remat", "reverse")
OBJECTIVES = ("last", "mean")
COLLECT_GRADIENTS = ("cut", "score")
NON_FINITE_TASKS = ("skip_update", "leave_out")


@aliases.accept_old_fields
class Problem(NamedTuple):
    """A family of tasks as pure functions. Each is written for ONE task; the loops add the task axis.

    Information for `task_loss` alone (true parameters, an expert's actions) is a field named `extra` of the task or of the
    context. `init`, `observe`, `plain_loss` and `collect` never read it.

    Attributes:
      sample_task: (key, context) -> task, any pytree of arrays.
      init: (key, task) -> params, a fresh optimizee.
      observe: (params, task, context, key, step) -> features [N, F], the input of the learned loss (or any pytree that the
        learned loss takes). step: [] int32, number of the inner step. If it depends on the number of inner steps, it has an
        attribute with_inner_steps: steps -> such a function; equal numbers must give equal functions.
      task_loss: (params, task, context, key) -> scalar that meta-training minimises.
      evaluate: (params, task, context, key) -> {name: scalar} that meta-test reports, in units.
      plain_loss: (params, task, context, key, step) -> scalar that an optimizee without a learned loss descends, on the
        data that observe sees. None: task_loss.
      collect: (params, task, context, key, step) -> task with the data of this inner step. It runs once an inner step,
        before observe and with the same key. No gradient passes through it.
      log_prob: (params, task, context, key, step) -> scalar, log-probability of the data that collect drew.
      refresh: (context, loss_params, params, tasks, key) -> context; params and tasks are [M, ...].
      samples_per_step: samples that one inner step takes from the environment or the stream ("env_steps").
      reused_rollout_loss: (params, task, context) -> scalar, task loss on the data that `collect` drew with these
        parameters. Lets objective "mean" reuse rollouts: it collects once an inner step.
    """

    sample_task: Callable[[jax.Array, Context], Task]
    init: Callable[[jax.Array, Task], Params]
    observe: Callable[[Params, Task, Context, jax.Array, jax.Array], PyTree]
    task_loss: Callable[[Params, Task, Context, jax.Array], jax.Array]
    evaluate: Callable[[Params, Task, Context, jax.Array], Mapping[str, jax.Array]]
    plain_loss: Callable[[Params, Task, Context, jax.Array, jax.Array], jax.Array] | None = None
    collect: Callable[[Params, Task, Context, jax.Array, jax.Array], Task] | None = None
    log_prob: Callable[[Params, Task, Context, jax.Array, jax.Array], jax.Array] | None = None
    refresh: Callable[[Context, LossParams, Params, Task, jax.Array], Context] | None = None
    samples_per_step: int | None = None
    reused_rollout_loss: Callable[[Params, Task, Context], jax.Array] | None = None

    def for_inner_steps(self, steps: int) -> "Problem":
        """The problem for inner loops of this many steps; `make_meta_learner`, `adapt` and `baseline` call it with theirs."""
        with_steps = getattr(self.observe, "with_inner_steps", None)
        return self if with_steps is None else self._replace(observe=with_steps(steps))


class LearnedLoss(NamedTuple):
    """A loss with parameters. Any pair (init, apply) is one; the loops never look inside parameters or features.

    Attributes:
      init: (key, features) -> loss_params. features: F, or an example of the output of observe (arrays or their shapes).
      apply: (loss_params, features [N, F] or any pytree) -> scalar, the loss of the batch.
      spec: registered name and arguments as JSON, which `ml3_jax.save` writes; None for a loss that is not registered.
      per_example: (loss_params, features [N, F]) -> [N], whose mean is `apply`; None if the loss has no such form.
      layout: how `ml3_jax.as_loss_fn` makes features of predictions and targets: "columns" concatenates them to
        [N, F], "classes" stacks them to [N, C, F].
      columns: names of the features in their order, with "..." for any others, if the loss gives them a meaning. None: any
        order. `ml3_jax.as_loss_fn` puts "prediction", "target" and the others in this order.
      target: (loss_params, features before those of the optimizee [..., F]) -> [..., A], the output that the loss pulls
        towards; None if it has no explicit target.
    """

    init: Callable[[jax.Array, Any], LossParams]
    apply: Callable[[LossParams, PyTree], jax.Array]
    spec: Mapping[str, Any] | None = None
    per_example: Callable[[LossParams, PyTree], jax.Array] | None = None
    layout: str = "columns"
    target: Callable[[LossParams, jax.Array], jax.Array] | None = None
    columns: tuple[str, ...] | None = None

    def __hash__(self) -> int:
        # A dictionary such as `spec` has no hash. Equal losses have equal functions and share a compilation.
        return hash((self.init, self.apply))


class InnerState(struct.PyTreeNode):
    """The inner loops of all tasks, carried from one meta-step to the next."""

    params: Params  # [M, ...]
    opt_state: optax.OptState  # [M, ...] of the inner optimizer
    task: Task  # [M, ...]
    age: jax.Array  # [M] int32, inner steps taken
    end: jax.Array  # [M] int32, age at which the inner loop is reset


class Particles(struct.PyTreeNode):
    """Perturbed copies of optimizees, in P mirrored pairs a task (`ml3_jax.persistent`)."""

    params: Params  # [M, P, 2, ...] under phi plus and minus a perturbation
    opt_state: optax.OptState  # [M, P, 2, ...]
    shift: Phi  # [M, P, ...] the sum of all perturbations of phi in this inner loop, in units of sigma


class PersistentInnerState(InnerState):
    """Inner loops with perturbed copies, which the estimator "pes" carries. `params` are the unperturbed optimizees."""

    particles: Particles  # [M, ...]


class MetaParams(struct.PyTreeNode):
    """All that meta-training learns, if it is more than a loss: the parameters of the meta-optimizer. None for a fixed part.

    A label of each part gives it a meta-optimizer of its own:
    optax.multi_transform({"a": ..., "b": ...}, MetaParams("a", "b", "b")).
    """

    loss_params: LossParams
    init_params: Params  # the learned initialisation
    optimizer_params: OptimizerParams


@aliases.accept_old_fields
class MetaState(struct.PyTreeNode):
    """The state of meta-training between two meta-steps."""

    step: jax.Array  # [] int32, meta-steps taken
    loss_params: LossParams  # phi; its axes are those of the learned loss. None without a learned loss
    opt_state: optax.OptState  # of the meta-optimizer; axes of loss_params, or a `MetaParams` of all that is learned
    context: Context  # shared by all tasks: no task axis
    key: jax.Array  # [] typed key, never changed; a meta-step folds its keys from it and from `step`
    inner_state: InnerState | None  # [M, ...]; None if every meta-step starts fresh inner loops and `refresh` needs no last one
    init_params: Params = None  # the learned initialisation of all tasks; None if it is not learned
    optimizer_params: OptimizerParams = None  # of a learned inner optimizer; None if it is fixed


class Metrics(struct.PyTreeNode):
    """The report of one meta-step; `run` stacks each field to [num_steps]."""

    task_loss: jax.Array  # [] mean over tasks of the objective, before this update of phi
    meta_grad_norm: jax.Array  # [] global norm of the meta-gradient, before any clipping
    skipped: jax.Array  # [] int32, 1 if the meta-step was not finite or exploded, and phi kept its value
    left_out: jax.Array  # [] int32, tasks left out of the mean because they were not finite (`non_finite_tasks`)
    dead: jax.Array  # [] int32, 1 if the meta-gradient was exactly zero: nothing is learned


class Adaptation(NamedTuple):
    """The result of meta-test: the adapted optimizee and its history.

    Attributes:
      params: the optimizee after the last step; axes of its initialisation.
      trace: {name: [steps + 1]}, each output of the problem's evaluate; index 0 before any update.
    """

    params: Params
    trace: dict[str, jax.Array]


class InitFn(Protocol):
    """Draws the first state of meta-training."""

    def __call__(self, key: jax.Array, context: Context = None) -> MetaState:
        """Returns the state before any meta-step; the problem's functions get `context`."""
        ...


class StepFn(Protocol):
    """One update of the learned loss."""

    def __call__(self, state: MetaState) -> tuple[MetaState, Metrics]:
        """Returns the next state and the metrics of this step, each field []."""
        ...


class RunFn(Protocol):
    """Many updates of the learned loss in one compiled loop."""

    def __call__(self, state: MetaState, num_steps: int) -> tuple[MetaState, Metrics]:
        """Returns the last state and the metrics, each field [num_steps]."""
        ...


class RunSeedsFn(Protocol):
    """Many updates of the learned losses of several seeds in one compiled loop."""

    def __call__(self, states: MetaState, num_steps: int) -> tuple[MetaState, Metrics]:
        """Returns the last states and the metrics, each field [S, num_steps]; all leaves of the states are [S, ...]."""
        ...


class Diagnose(Protocol):
    """Looks for what is not finite in a meta-step."""

    def __call__(self, state: MetaState, operation: bool = False) -> str:
        """Returns words: which term of the state's next meta-step is not finite, in which task and inner step.

        With operation=True they name the first operation to blame and its line of source. One operation is evaluated at a
        time, which takes seconds to minutes.
        """
        ...


class MetaLearner(NamedTuple):
    """Meta-training as pure functions, built by `ml3_jax.make_meta_learner`.

    `run_seeds` is `run` for several seeds under one vmap; unlike `jax.vmap(run)` it uses all devices.
    """

    init: InitFn
    step: StepFn
    run: RunFn
    refresh: Callable[[MetaState], MetaState]
    diagnose: Diagnose
    run_seeds: RunSeedsFn


__getattr__ = aliases.module_getattr(__name__)
