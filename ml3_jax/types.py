"""The contracts that everything else composes: a problem, a learned loss, a meta-learner and what they carry.

A `Problem` and a `LearnedLoss` go into `ml3_jax.make_meta_learner`, which returns a `MetaLearner`;
`ml3_jax.adapt` and `ml3_jax.baseline` return an `Adaptation`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import optax
from flax import struct

PyTree = Any
Params = Any  # theta, the optimizee's parameters
LossParams = Any  # phi, the learned loss's parameters
Task = Any
Context = Any


class Problem(NamedTuple):
    """A family of tasks as pure functions, each written for ONE task; the loops add the task axis.

    Whatever only `task_loss` may see (the true parameter, an expert's actions) stands in a field named `extra` of the
    task or of the context: `init`, `observe`, `plain_loss` and `collect` never read it.

    Attributes:
      sample_task: (key, context) -> task, any pytree of arrays.
      init: (key, task) -> params, a fresh optimizee.
      observe: (params, task, context, key, step) -> features [N, F], what the learned loss sees of each sample (or any
        pytree that the learned loss takes). step: number of the inner step, int32.
      task_loss: (params, task, context, key) -> scalar, what meta-training minimises.
      evaluate: (params, task, context, key) -> {name: scalar}, what meta-test reports, in units.
      plain_loss: (params, task, context, key, step) -> scalar, what one would descend without a learned loss, on the
        data that observe sees; None stands for task_loss.
      collect: (params, task, context, key, step) -> task with the data of this inner step; called once an inner
        step, before observe and with the same key. No gradient passes through it.
      log_prob: (params, task, context, key, step) -> scalar, the log-probability of what collect drew.
      collected_loss: (params, task, context) -> scalar, the task loss on what collect drew under these very parameters, for
        a task_loss that would draw the like anew. With it, objective "mean" collects once an inner step: what judges the
        parameters after a step is what the next step learns from.
      refresh: (context, loss_params, params, tasks, key) -> context; params and tasks carry a leading task axis [M].
      samples_per_step: how many samples one inner step takes from the environment or stream ("env_steps").
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
    collected_loss: Callable[[Params, Task, Context], jax.Array] | None = None


class LearnedLoss(NamedTuple):
    """A loss with parameters. Any pair (init, apply) is one; the loops look inside neither parameters nor features.

    Attributes:
      init: (key, features) -> loss_params; features is F, or an example (arrays or their shapes) of what observe
        returns.
      apply: (loss_params, features) -> scalar, the loss of the whole batch.
      spec: its registered name and arguments as JSON, what `ml3_jax.save` writes; None for one's own.
      per_example: (loss_params, features) -> [N], whose mean over N is `apply`; None where the loss has no such form.
      layout: how `ml3_jax.as_loss_fn` makes features of predictions and targets: "columns" concatenates them to
        [N, F], "classes" stacks them to [N, C, F].
      target: (loss_params, the features that stand before the optimizee's own [..., F]) -> [..., A], where the loss wants the
        optimizee's outputs; None where it wants them nowhere in particular.
    """

    init: Callable[[jax.Array, Any], LossParams]
    apply: Callable[[LossParams, PyTree], jax.Array]
    spec: Mapping[str, Any] | None = None
    per_example: Callable[[LossParams, PyTree], jax.Array] | None = None
    layout: str = "columns"
    target: Callable[[LossParams, jax.Array], jax.Array] | None = None

    def __hash__(self) -> int:
        # A spec is a dictionary: it describes init and apply, which stand for it here. Equal losses share a compilation.
        return hash((self.init, self.apply))


class Lives(struct.PyTreeNode):
    """The optimizees that live on between meta-steps; every field has a leading task axis M."""

    params: Params  # [M, ...]
    opt_state: optax.OptState  # [M, ...] of the inner optimizer
    task: Task  # [M, ...]
    age: jax.Array  # [M] int32, inner steps taken
    end: jax.Array  # [M] int32, the age at which the optimizee is drawn anew


class MetaState(struct.PyTreeNode):
    """What meta-training carries from one meta-step to the next."""

    step: jax.Array  # [] int32, meta-steps taken
    loss_params: LossParams
    opt_state: optax.OptState  # of the meta-optimizer
    context: Context
    key: jax.Array  # [] typed key, never changed: a meta-step's keys are folded from it and from `step`
    lives: Lives | None  # None where every meta-step draws its optimizees anew and nothing asks for the last ones


class Metrics(struct.PyTreeNode):
    """What one meta-step reports; `run` stacks each field to [num_steps]."""

    task_loss: jax.Array  # [] mean over tasks of the objective, before this update of phi
    meta_grad_norm: jax.Array  # [] global norm of the meta-gradient, before any clipping
    skipped: jax.Array  # [] int32, 1 where the meta-gradient was not finite and phi was left as it was


class Adaptation(NamedTuple):
    """What meta-test returns: the adapted optimizee and its history.

    Attributes:
      params: the optimizee after the last step.
      trace: {name: [steps + 1]}, each output of the problem's evaluate; index 0 before any update.
    """

    params: Params
    trace: dict[str, jax.Array]


class InitFn(Protocol):
    """Draws the state that meta-training starts from."""

    def __call__(self, key: jax.Array, context: Context = None) -> MetaState:
        """Returns the state before any meta-step; `context` is what the problem's functions get as such."""
        ...


class StepFn(Protocol):
    """One update of the learned loss."""

    def __call__(self, state: MetaState) -> tuple[MetaState, Metrics]:
        """Returns the next state and the metrics (scalars) of this step."""
        ...


class RunFn(Protocol):
    """Many updates of the learned loss in one compiled loop."""

    def __call__(self, state: MetaState, num_steps: int) -> tuple[MetaState, Metrics]:
        """Returns the last state and the metrics, each field [num_steps]."""
        ...


class MetaLearner(NamedTuple):
    """Meta-training as pure functions, built by `ml3_jax.make_meta_learner`."""

    init: InitFn
    step: StepFn
    run: RunFn
    refresh: Callable[[MetaState], MetaState]
