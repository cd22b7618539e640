"""`compute_dtype`: low-precision products inside the inner loop alone, and a meta-gradient close to that of float32."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ml3_jax
from ml3_jax.compute_dtype import check_compute_dtype
from ml3_jax.problems import supervised
from ml3_jax.types import GRADIENT_MODES
from tests.ml3_jax import toys

# Of the meta-gradient of a small network on sines, beside the one in float32. `benchmarks.precision` measures a larger one.
LEAST_COSINE = 0.999
LARGEST_ERROR = 0.05  # relative, in the Euclidean norm
SINES = supervised.make_problem(ml3_jax.networks.MLP((16, 8, 1)), toys.sample_sine)


def learner(
    problem: ml3_jax.Problem = SINES, loss: ml3_jax.LearnedLoss | str = "smooth", **options: Any
) -> ml3_jax.MetaLearner:
    """Gradient descent with step size 1, so that the change of phi is the meta-gradient."""
    return toys.learner(problem, loss, meta_optimizer=optax.sgd(1.0), **{"inner_steps": 2, "num_tasks": 4, **options})


def meta_gradient(meta: ml3_jax.MetaLearner, context: Any = None) -> np.ndarray:
    before = meta.init(toys.KEY, context)
    after, metrics = meta.step(before)
    assert int(metrics.skipped) == 0
    assert metrics.task_loss.dtype == metrics.meta_grad_norm.dtype == jnp.float32
    return toys.flat(before.loss_params) - toys.flat(after.loss_params)


def assert_close(found: np.ndarray, expected: np.ndarray, error: float = LARGEST_ERROR) -> None:
    norms = np.linalg.norm(found), np.linalg.norm(expected)
    assert found @ expected / np.prod(norms) >= LEAST_COSINE
    assert np.linalg.norm(found - expected) <= error * norms[1]


def equations(jaxpr: Any) -> list[Any]:
    """All equations of a program, those of its loops and branches too."""
    found = []
    for equation in jaxpr.eqns:
        found.append(equation)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            found += equations(inner) if hasattr(inner, "eqns") else []
    return found


def product_types(meta: ml3_jax.MetaLearner) -> list[tuple[str, ...]]:
    """The types of the factors of every matrix product of a meta-step."""
    program = jax.make_jaxpr(meta.step)(meta.init(toys.KEY)).jaxpr
    products = [equation for equation in equations(program) if equation.primitive.name == "dot_general"]
    return [tuple(str(factor.aval.dtype) for factor in product.invars) for product in products]


@pytest.mark.parametrize("mode", GRADIENT_MODES)
def test_the_meta_gradient_agrees_with_that_of_float32_in_every_mode(mode):
    plain, low = (meta_gradient(learner(gradient=mode, compute_dtype=dtype)) for dtype in (None, "bfloat16"))
    assert not np.array_equal(plain, low)
    assert_close(low, plain)


def test_products_are_bfloat16_in_the_inner_loop_and_float32_in_the_task_loss():
    types = product_types(learner(compute_dtype=jnp.bfloat16))
    assert set(types) == {("bfloat16", "bfloat16"), ("float32", "float32")}
    # Three layers: the forward pass of flax's init, and of the task loss 3 products forward and 5 of its gradient.
    assert types.count(("float32", "float32")) == 11
    assert product_types(learner()) == [("float32", "float32")] * len(types)


def test_phi_theta_and_the_states_of_both_optimizers_stay_in_float32():
    options = {"inner_steps": 4, "unroll": 2, "inner_optimizer": optax.adam(0.01, eps_root=1e-8), "compute_dtype": "bfloat16"}
    meta = learner(**options)
    before = meta.init(toys.KEY)
    after, _ = meta.run(before, 2)
    assert after.inner_state is not None
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, before)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((after.loss_params, after.inner_state.params))} == {"float32"}


def test_evolution_strategies_and_float16_work_too():
    plain, low = (meta_gradient(learner(estimator="es", compute_dtype=dtype)) for dtype in (None, "bfloat16"))
    assert_close(low, plain, 2 * LARGEST_ERROR)  # differences of losses
    assert_close(meta_gradient(learner(compute_dtype=jnp.float16)), meta_gradient(learner()))


class Mixed(NamedTuple):
    """A task with leaves that have no floating-point type."""

    key: jax.Array  # [] typed
    index: jax.Array  # [] int32
    mask: jax.Array  # [4] bool
    missing: None
    target: jax.Array  # [] float32


def mixed() -> ml3_jax.Problem:
    """Reaches the number that a key, an index and a mask name."""

    def observe(params, task: Mixed, context, key, step):
        assert task.index.dtype == jnp.int32
        assert task.mask.dtype == bool
        assert task.missing is None
        assert jnp.issubdtype(task.key.dtype, jax.dtypes.prng_key)
        noise = jax.random.normal(task.key, (4,))  # float32 inside
        pulled = jnp.where(task.mask, task.target + context["shift"][task.index], task.target)
        return jnp.stack([params + 0.01 * noise, pulled], axis=-1)

    def sample_task(key, context) -> Mixed:
        return Mixed(key, jnp.asarray(1), jnp.arange(4) % 2 == 0, None, jax.random.normal(key))

    return ml3_jax.Problem(
        sample_task=sample_task,
        init=lambda key, task: jnp.zeros(()),
        observe=observe,
        task_loss=lambda params, task, context, key: (params - task.target) ** 2,
        evaluate=lambda params, task, context, key: {"error": params},
    )


def test_keys_whole_numbers_booleans_and_missing_leaves_are_left_alone():
    context = {"shift": jnp.array([0.0, 0.1, 0.2]), "nothing": None}
    plain, low = (meta_gradient(learner(mixed(), compute_dtype=dtype), context) for dtype in (None, "bfloat16"))
    assert_close(low, plain)


def test_without_the_option_float64_stays_float64(x64):
    meta = learner()
    state = meta.init(toys.KEY)
    program = jax.make_jaxpr(meta.step)(state).jaxpr
    kinds = {str(equation.invars[0].aval.dtype) for equation in equations(program) if equation.primitive.name == "dot_general"}
    assert kinds == {"float64"}


def test_meta_test_is_in_the_types_of_its_arguments():
    phi = toys.smooth_loss().init(toys.KEY, 2)

    def adapted(phi):
        task = SINES.sample_task(toys.KEY, None)
        optimizer = optax.sgd(0.1)
        return ml3_jax.adapt(SINES, toys.smooth_loss(), phi, task, None, toys.KEY, optimizer=optimizer, steps=2).params

    assert "bf16" not in str(jax.make_jaxpr(adapted)(phi))


@pytest.mark.parametrize(
    "wrong", ["float8", "int32", jnp.float64, 16, object()], ids=["float8", "int32", "float64", "16", "object"]
)
def test_another_type_is_refused(wrong):
    with pytest.raises(ValueError, match="compute_dtype: expected bfloat16, float16, float32 or None, got"):
        learner(compute_dtype=wrong)
    assert check_compute_dtype(None) is None
