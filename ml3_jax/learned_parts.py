"""Which parts are learned: the loss, the initialisation and the inner optimizer, each learned or fixed.

`outer` joins the learned parts of a state to phi and splits it again. `meta_gradient` starts inner loops under phi. A fixed
part is no part of the compiled program.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ml3_jax.descent import all_finite, check_real
from ml3_jax.inner_state import InitInner, make_init_inner, strong
from ml3_jax.optimizers import LearnedOptimizer
from ml3_jax.types import InnerState, LearnedLoss, LossParams, MetaParams, OptimizerParams, Params, Phi, Problem

_INIT, _OPTIMIZER = 2**32 - 1, 2**32 - 2  # folded into the key of the loss


class LearnedParts(NamedTuple):
    """The parts that a meta-learner learns. Phi is loss_params alone if the loss is all, else a `MetaParams`."""

    learned_loss: LearnedLoss | None
    learn_init: bool
    inner_optimizer: optax.GradientTransformation | LearnedOptimizer

    @property
    def learned_optimizer(self) -> LearnedOptimizer | None:
        """The inner optimizer if it has parameters to learn."""
        return self.inner_optimizer if isinstance(self.inner_optimizer, LearnedOptimizer) else None

    @property
    def loss_alone(self) -> bool:
        """Whether a learned loss is all that is learned."""
        return not self.learn_init and self.learned_optimizer is None

    def join(self, loss_params: LossParams, init_params: Params, optimizer_params: OptimizerParams) -> Phi:
        """Phi of its parts, as a state has them.

        Raises:
          ValueError: a part is there and not learned, or learned and not there: the state is of another learner.
        """
        given = {"loss_params": loss_params, "init_params": init_params, "optimizer_params": optimizer_params}
        learned = (self.learned_loss is not None, self.learn_init, self.learned_optimizer is not None)
        for (name, value), is_learned in zip(given.items(), learned, strict=True):
            if is_learned != (value is not None):
                expected, came = ("parameters", "None") if is_learned else ("None", "parameters")
                raise ValueError(
                    f"state: expected {expected} as {name}, got {came}: this learner learns {self.words()}; take the state "
                    "from its init, and replace the parts that you have"
                )
        return loss_params if self.loss_alone else MetaParams(**given)

    def split(self, phi: Phi) -> tuple[LossParams, Params, OptimizerParams]:
        """(loss_params, init_params, optimizer_params), None for a fixed part."""
        if self.loss_alone:
            return phi, None, None
        return phi.loss_params, phi.init_params, phi.optimizer_params

    def words(self) -> str:
        """The learned parts in words, for errors."""
        named = {"the loss": self.learned_loss, "the initialisation": self.learn_init, "step sizes": self.learned_optimizer}
        return " and ".join(name for name, learned in named.items() if learned)

    def optimizer(self, phi: Phi) -> optax.GradientTransformation:
        """The inner optimizer under phi."""
        if isinstance(self.inner_optimizer, LearnedOptimizer):
            return self.inner_optimizer.make(self.split(phi)[2])
        return self.inner_optimizer

    def make_init_inner(self, problem: Problem) -> InitInner:
        """`inner_state.make_init_inner` without the parts that `begin` adds."""
        fixed = None if self.learn_init else self.inner_optimizer
        return make_init_inner(problem, None if isinstance(fixed, LearnedOptimizer) else fixed, not self.learn_init)

    def init(self, key: jax.Array, problem: Problem, drawn: InnerState, features_of: Callable[[Params], Any]) -> Phi:
        """The first phi.

        Args:
          key: of the loss; the other parts have keys folded from it.
          problem: its init draws the initialisation of a learned one.
          drawn: a draw of `make_init_inner`.
          features_of: params -> shapes of the features that the learned loss takes.
        """
        params = drawn.params
        if self.learn_init:
            params = strong(problem.init(jax.random.fold_in(key, _INIT), drawn.task))
            check_real("init", params)
        loss_params = optimizer_params = None
        if self.learned_loss is not None:
            loss_params = strong(self.learned_loss.init(key, features_of(params)))
            check_real("the learned loss's init", loss_params)
        if self.learned_optimizer is not None:
            optimizer_params = strong(self.learned_optimizer.init(jax.random.fold_in(key, _OPTIMIZER), params))
            check_real("the inner optimizer's init", optimizer_params)
        return self.join(loss_params, params if self.learn_init else None, optimizer_params)

    def begin(self, phi: Phi, drawn: InnerState) -> InnerState:
        """The start of an inner loop under phi, from the draw of `inner_state.make_init_inner`."""
        if self.loss_alone:
            return drawn
        params = self.split(phi)[1] if self.learn_init else drawn.params
        return drawn.replace(params=params, opt_state=self.optimizer(phi).init(params))

    def begin_newborn(self, phi: Phi, start: InnerState) -> InnerState:
        """A carried inner loop; if its age is 0, at its start under phi.

        A gradient flows from a newborn optimizee to the learned initialisation. An older one is a constant.
        """
        if self.loss_alone:
            return start
        begun, newborn = self.begin(phi, start), start.age == 0
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(newborn, new, old), (begun.params, begun.opt_state), (start.params, start.opt_state)
        )
        return start.replace(params=params, opt_state=opt_state)

    def credited(self, noise: Phi, age: jax.Array) -> Phi:
        """The perturbation of phi as an inner loop of this age feels it: that of the initialisation only at its start."""
        if not self.learn_init:
            return noise
        of_init = jax.tree.map(lambda leaf: jnp.where(age == 0, leaf, jnp.zeros_like(leaf)), noise.init_params)
        return noise.replace(init_params=of_init)


def not_finite(phi: Phi) -> str:
    """Which part of phi is not finite, as a sentence; empty if all are."""
    loss_params, init_params, optimizer_params = (
        (phi.loss_params, phi.init_params, phi.optimizer_params) if isinstance(phi, MetaParams) else (phi, None, None)
    )
    parts: dict[str, Any] = {
        "the parameters of the learned loss are": loss_params,
        "the learned initialisation is": init_params,
        "the parameters of the inner optimizer are": optimizer_params,
    }
    bad = [words for words, part in parts.items() if part is not None and not bool(all_finite(part))]
    return f"{bad[0]} not finite" if bad else ""
