"""The checks of the arguments of `make_meta_learner`: their kinds, their choices, and options without effect."""

from typing import Any

from ml3_jax.arguments import check_callable, check_choice, check_kind, check_optimizer
from ml3_jax.inner_state import Sizes
from ml3_jax.learned_parts import LearnedParts
from ml3_jax.optimizers import LearnedOptimizer
from ml3_jax.types import GRADIENT_MODES, NON_FINITE_TASKS, OBJECTIVES, LearnedLoss, Problem


def check_kinds(problem: Any, learned_loss: Any, inner_optimizer: Any, meta_optimizer: Any, auxiliary_loss: Any) -> None:
    """Checks the kinds of the arguments.

    Raises:
      TypeError: an argument of another kind.
    """
    check_kind("problem", problem, Problem, "as ml3_jax.problems makes them")
    for name in ("sample_task", "init", "observe", "task_loss", "evaluate"):
        check_callable(f"problem.{name}", getattr(problem, name))
    for name in ("plain_loss", "collect", "log_prob", "refresh"):
        check_callable(f"problem.{name}", getattr(problem, name), optional=True)
    if learned_loss is not None:
        check_kind("learned_loss", learned_loss, LearnedLoss, "as ml3_jax.losses has them")
    if not isinstance(inner_optimizer, LearnedOptimizer):
        check_optimizer("inner_optimizer", inner_optimizer)
    check_optimizer("meta_optimizer", meta_optimizer)
    check_callable("auxiliary_loss", auxiliary_loss, optional=True)


def check_learned(learned: LearnedParts, auxiliary_loss: Any, compute_dtype: Any) -> None:
    """Checks that there is something to learn, and that no option is about a loss that is not there.

    Raises:
      TypeError: learn_init is no boolean.
      ValueError: nothing is learned, or an option has no effect without a learned loss.
    """
    if not isinstance(learned.learn_init, bool):
        raise TypeError(
            f"learn_init: expected True or False, got a {type(learned.learn_init).__name__}: the first initialisation is a "
            "draw of the problem's init; to start from another one, replace init_params of the state"
        )
    if learned.learned_loss is not None:
        return
    if learned.loss_alone:
        raise ValueError(
            "learned_loss: expected something to learn, got None with learn_init=False and a plain optax optimizer: give a "
            "learned_loss, learn_init=True, or an inner_optimizer with learned step sizes such as "
            "ml3_jax.optimizers.learned_sgd(0.01)"
        )
    for name, value in {"auxiliary_loss": auxiliary_loss, "compute_dtype": compute_dtype}.items():
        if value is not None:
            raise ValueError(f"{name} has no effect with learned_loss=None: it is about the learned loss; leave it out")


def check_modes(gradient: str, objective: str, non_finite_tasks: str, max_meta_grad_norm: float) -> None:
    """Checks the choices among names, and the largest norm.

    Raises:
      ValueError: an unknown name, or a norm that is not positive and finite.
    """
    check_choice("gradient", gradient, GRADIENT_MODES)
    check_choice("objective", objective, OBJECTIVES)
    check_choice("non_finite_tasks", non_finite_tasks, NON_FINITE_TASKS)
    if not 0.0 < max_meta_grad_norm < float("inf"):
        raise ValueError(f"max_meta_grad_norm: expected a positive, finite number, got {max_meta_grad_norm}")


def refuse_options_without_effect(
    learned: LearnedParts,
    sizes: Sizes,
    derivative_free: str | None,
    gradient: str,
    collect_gradient: str,
    staggered_resets: bool,
    non_finite_tasks: str,
) -> None:
    """Checks that each option changes something.

    Raises:
      ValueError: an option has no effect beside the others.
    """
    if derivative_free is not None and (gradient != "mixed" or collect_gradient != "cut"):
        name, value, default = ("gradient", gradient, "mixed") if gradient != "mixed" else ("collect_gradient", "score", "cut")
        raise ValueError(
            f'{name}="{value}" has no effect with estimator="{derivative_free}", which takes no derivative of the inner loop: '
            f'leave {name} at "{default}", or choose estimator="backprop"'
        )
    if collect_gradient == "score" and sizes.unroll == 1 and not learned.learn_init:
        raise ValueError(
            'collect_gradient="score" has no effect with unroll=1: the data of the first unrolled step do not depend on phi; '
            'choose "cut", or a longer unroll'
        )
    if collect_gradient == "score" and non_finite_tasks == "leave_out":
        raise ValueError(
            'non_finite_tasks="leave_out" needs a gradient of each task alone, and with collect_gradient="score" it depends on '
            'the losses of the others: choose "skip_update" or "cut"'
        )
    if sizes.full_unroll and not staggered_resets:
        raise ValueError(
            "staggered_resets=False has no effect with unroll == inner_steps, where every meta-step resets all inner loops: "
            "leave it out, or choose a shorter unroll"
        )
