"""Controls that use the meta-train tasks: one optimizee trained on all of them, and an initialisation meta-trained by MAML."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import ml3_jax
from launch import optimizers
from ml3_jax import sharding
from ml3_jax.optimizers import learned_sgd

MAML_CLIP = 10.0  # largest norm of a meta-gradient of `maml`


def pretrain(
    problem: ml3_jax.Problem, context: Any, key: Array, *, num_tasks: int, steps: int, learning_rate: float = 1e-3
) -> Any:
    """Trains one optimizee with Adam on the mean task loss of `num_tasks` fresh tasks in each step.

    `problem` and `context` are those of meta-training. The result, params, starts the curve "pretrained_tuned".
    """
    optimizer = optax.adam(learning_rate)

    def gradient_over(keys: Array, params: Any, context: Any) -> tuple[tuple[Array, None], Any]:
        def of_task(params: Any, key: Array) -> Array:
            task_key, loss_key = jax.random.split(key)
            return problem.task_loss(params, problem.sample_task(task_key, context), context, loss_key)

        value, gradient = jax.value_and_grad(lambda params: jnp.mean(jax.vmap(of_task, (None, 0))(params, keys)))(params)
        return (value, None), gradient

    mean_gradient = sharding.mean_over_devices(gradient_over, sharding.mesh_for(num_tasks))

    @jax.jit
    def run(key: Array, context: Any) -> Any:
        def update(carry: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], None]:
            params, opt_state = carry
            _, gradient = mean_gradient(jax.random.split(key, num_tasks), params, context)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        task_key, init_key, run_key = jax.random.split(key, 3)
        params = problem.init(init_key, problem.sample_task(task_key, context))
        (params, _), _ = jax.lax.scan(update, (params, optimizer.init(params)), jax.random.split(run_key, steps))
        return params

    return sharding.uncommit(run(key, sharding.uncommit(context)))


def maml(
    problem: ml3_jax.Problem,
    context: Any,
    key: Array,
    *,
    num_tasks: int,
    steps: int,
    inner_lr: float = 0.01,
    inner_steps: int = 1,
    meta_lr: float = 1e-3,
    learn_step_size: bool = False,
) -> Any:
    """Meta-trains an initialisation for SGD on the plain loss, with Adam outside (Finn et al. 2017, arXiv:1703.03400).

    The meta-objective is the mean task loss over the inner steps. With `learn_step_size`, `inner_lr` is where the inner step
    size starts: for problems in which nobody knows a good one. `meta_lr` decays along a cosine, and meta-gradients are clipped:
    without both, one of three seeds of `few_shot_sine` ended three times as high.
    `problem` and `context` are those of meta-training. The result, params, starts the curve "maml".
    """
    meta = ml3_jax.make_meta_learner(
        problem,
        None,
        learn_init=True,
        inner_optimizer=learned_sgd(inner_lr) if learn_step_size else optax.sgd(inner_lr),
        meta_optimizer=optimizers.meta("adam", meta_lr, clip=MAML_CLIP, decay_steps=steps),
        num_tasks=num_tasks,
        inner_steps=inner_steps,
        objective="mean",
    )
    state, _ = meta.run(meta.init(key, sharding.uncommit(context)), steps)
    return sharding.uncommit(state.init_params)


def cached(train: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """A function of a key that computes the result of each key once, for scenarios that share a control."""
    done: dict[bytes, Any] = {}

    def trained(key: Array) -> Any:
        name = np.asarray(jax.random.key_data(key)).tobytes()
        if name not in done:
            done[name] = train(key)
        return done[name]

    return trained
