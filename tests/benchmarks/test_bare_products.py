"""The bare program has the matrix products of a meta-step in their number and sizes. No test reads a clock."""

import collections
import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import bare_products, sine
from ml3_jax.inner import observed_loss
from ml3_jax.inner_gradient import make_inner_gradient

KEY = jax.random.key(0)
PHI, BATCH, *INPUTS = bare_products.arrays_of(1)
PARAMS, (X, Y) = jax.tree.map(lambda leaf: leaf[0], (BATCH, INPUTS))


def multiplications(function, *args) -> collections.Counter:
    """How many matrix products of each size a program has; its results that nobody reads are left out."""
    text = jax.jit(function).lower(*args).as_text()
    found = re.findall(r"dot_general.*: \(tensor<(.*?)xf32>, tensor<(.*?)xf32>\) -> tensor<(.*?)xf32>", text)
    # Of [m, k] x [k, n] = [m, n] the product of all sizes is (m k n)^2.
    return collections.Counter(math.isqrt(math.prod(map(int, "x".join(shapes).split("x")))) for shapes in found)


def test_the_products_of_an_inner_step_and_of_its_derivative_are_those_of_the_library():
    task = sine.sample_task(KEY, None)
    params, phi = sine.PROBLEM.init(KEY, task), sine.LEARNED_LOSS.init(KEY, 2)
    gradient = make_inner_gradient(observed_loss(sine.PROBLEM, sine.LEARNED_LOSS), "mixed")

    def forward(phi, params):
        return gradient(phi, params, task, None, KEY, jnp.zeros((), jnp.int32))

    def back(phi, params, direction):
        return jax.vjp(forward, phi, params)[1](direction)

    inner = multiplications(bare_products.inner_step, PARAMS, PHI, X, Y)
    assert inner == multiplications(forward, phi, params)
    inner_back = multiplications(bare_products.inner_step_back, PARAMS, PARAMS, PHI, X, Y)
    assert inner_back == multiplications(back, phi, params, params)
    task_loss = multiplications(bare_products.task_loss, PARAMS, X)
    assert task_loss == multiplications(jax.grad(lambda params: sine.PROBLEM.task_loss(params, task, None, KEY)), params)
    assert [products.total() for products in (inner, task_loss, inner_back)] == [14, 8, 36]
    assert bare_products.count(3) == 3 * 14 + 8 + 3 * 36
    operations = [2.0 * sum(size * times for size, times in products.items()) for products in (inner, task_loss, inner_back)]
    assert bare_products.flops(5, 3) == 5 * np.dot([3, 1, 3], operations)


def test_a_row_has_the_share_and_both_times():
    row = bare_products.measure(4, 2, rounds=1)
    assert row["products"] == 4 * 108
    assert row["chunk"] in (1, 2, 4)
    assert row["share"] > 0
    assert row["ms"]["bare"] > 0
    assert row["floor"] is None
