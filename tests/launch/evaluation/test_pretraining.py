"""The pretrained control learns what the meta-train tasks share."""

import jax
import jax.numpy as jnp
import numpy as np

from launch.evaluation.pretraining import pretrain
from tests.launch import line


def test_one_optimizee_moves_to_the_middle_of_the_tasks():
    problem = line.make_problem(line.LineConfig())

    def sample_task(key, context):
        task = problem.sample_task(key, context)
        return task._replace(extra=0.1 * task.extra + jnp.array([2.0, -1.0]))

    params = pretrain(
        problem._replace(sample_task=sample_task),
        jnp.linspace(-1.0, 1.0, 16),
        jax.random.key(0),
        num_tasks=16,
        steps=400,
        learning_rate=0.05,
    )
    # The mean of squared distances to the tasks is lowest at their mean, (2, -1); its spread is 0.1.
    np.testing.assert_allclose([params["slope"], params["offset"]], [2.0, -1.0], atol=0.1)
