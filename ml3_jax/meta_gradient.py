"""The meta-gradient: the objective of phi over a batch of tasks, and its gradient on one or several devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ml3_jax import chunks, estimators, sharding
from ml3_jax.inner import Sampled, as_scalar, collected, observed_loss, split_keys
from ml3_jax.lives import Newborn, Sizes, reborn
from ml3_jax.types import Context, LearnedLoss, Lives, LossParams, Problem, PyTree, Task

# (loss_params, task, context, key) -> scalar
AuxiliaryLoss = Callable[[LossParams, Task, Context, jax.Array], jax.Array]

# ((objective, (lives, auxiliary losses or None)), its gradient) of (loss_params, context, lives, key, mesh)
MetaGradient = Callable[
    [LossParams, Context, Lives | None, jax.Array, Mesh | None],
    tuple[tuple[jax.Array, tuple[Lives | None, jax.Array | None]], LossParams],
]

_AUXILIARY = 2**32 - 1  # no inner step has this number: the key of the auxiliary loss is folded with it


def make_meta_gradient(
    problem: Problem,
    learned_loss: LearnedLoss,
    segment: Callable[..., tuple[Any, tuple[Any, Any]]],
    newborn: Newborn,
    estimate: estimators.Estimator,
    sizes: Sizes,
    *,
    keep_lives: bool,
    auxiliary_loss: AuxiliaryLoss | None,
) -> MetaGradient:
    """The gradient of the mean objective over `sizes.num_tasks` tasks after one segment of each.

    Args:
      problem: the problem, for what an inner step of it costs.
      learned_loss: the loss to train.
      segment: of `ml3_jax.inner.make_segment`.
      newborn: of `ml3_jax.lives.make_newborn`.
      estimate: how a gradient is found (`ml3_jax.estimators`).
      sizes: tasks and steps.
      keep_lives: whether the optimizees are returned, or None in their place.
      auxiliary_loss: as of `ml3_jax.make_meta_learner`.

    Returns:
      (loss_params, context, lives, key, mesh) -> ((mean objective, (lives that the segments leave, auxiliary losses [M] or
      None)), gradient).
    """

    def draw(keys: jax.Array, context: Context) -> Lives:
        """A newborn for each key."""
        return jax.vmap(newborn, in_axes=(0, None, None))(keys, context, jnp.asarray(sizes.inner_steps, jnp.int32))

    def live_on(loss_params: LossParams, context: Context, life: Lives | None, born: Lives, key: jax.Array):
        """One segment of one task: (objective, (the life that it leaves, auxiliary loss))."""
        now = born if life is None or sizes.whole_lives else reborn(born, life)
        keys = split_keys(key)
        value, (params, opt_state) = segment(loss_params, now.params, now.opt_state, now.task, context, keys, now.age)
        beside = None
        if auxiliary_loss is not None:
            key = jax.random.fold_in(keys.outer, _AUXILIARY)
            beside = as_scalar(auxiliary_loss(loss_params, now.task, context, key), "auxiliary_loss")
        if not keep_lives:
            return value, (None, beside)
        return value, (now.replace(params=params, opt_state=opt_state, age=now.age + sizes.unroll), beside)

    def of_tasks(xs: PyTree, loss_params: LossParams, context: Context):
        """Some tasks' mean, a chunk of them at a time; xs: (lives, birth keys, step keys, estimate keys) of each."""
        lives, birth_keys, step_keys, estimate_keys = xs
        at_once = chunks.tree_bytes(jax.eval_shape(draw, birth_keys, context)) <= chunks.DRAW_BYTES
        births = draw(birth_keys, context) if at_once else birth_keys

        def of_chunk(chunk):
            lives, births, keys, estimate_keys = chunk
            born = births if at_once else draw(births, context)

            def objective(phi: LossParams) -> tuple[jax.Array, tuple[Lives | None, jax.Array | None]]:
                values, (lived, beside) = jax.vmap(live_on, in_axes=(None, None, 0, 0, 0))(phi, context, lives, born, keys)
                value = estimators.score_surrogate(*values) if isinstance(values, Sampled) else jnp.mean(values)
                if beside is not None:
                    value = value + jnp.mean(beside)
                return value, (lived, beside)

            return estimate(objective, loss_params, estimate_keys[0])

        bytes_per_task, simulates = _cost_of_inner_step(problem, learned_loss, newborn, loss_params, context, birth_keys[0])
        size = chunks.chunk_size(birth_keys.shape[0], bytes_per_task, simulates=simulates)
        return chunks.mean_over_chunks(of_chunk, (lives, births, step_keys, estimate_keys), loss_params, size)

    def meta_gradient(loss_params: LossParams, context: Context, lives: Lives | None, key: jax.Array, mesh: Mesh | None):
        task_keys, estimate_keys = jax.random.split(key, (2, sizes.num_tasks))
        keys = jax.vmap(jax.random.split)(task_keys)
        xs = lives, keys[:, 0], keys[:, 1], estimate_keys
        return sharding.mean_over_devices(of_tasks, mesh)(xs, loss_params, context)

    return meta_gradient


def _cost_of_inner_step(
    problem: Problem, learned_loss: LearnedLoss, newborn: Newborn, loss_params: LossParams, context: Context, key: jax.Array
) -> tuple[int, bool]:
    """(bytes that one inner step of one task computes on its way forward, whether it simulates a system), from shapes alone."""
    life = jax.eval_shape(newborn, key, context, jnp.zeros((), jnp.int32))

    def collect(*args: Any) -> Task:
        return collected(problem, *args)

    where = (life.params, life.task, context, key, life.age)
    data = jax.eval_shape(collect, *where)
    loss = observed_loss(problem, learned_loss)
    amount = chunks.intermediate_bytes(loss, loss_params, life.params, data, context, key, life.age)
    return amount, chunks.has_loop(collect, *where)
