"""The README's commands and its Python snippet work."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np

README = pathlib.Path(__file__).parents[1] / "README.md"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


def test_the_first_shell_block_is_the_main_job_and_the_second_one_the_tests():
    job, tests = _blocks("sh")[:2]
    assert "launch.meta_train" in job
    assert "--workdir=runs/" in job
    assert "pytest" in tests
    assert all("pip install" in block for block in (job, tests))


def test_the_snippet_learns_a_loss_that_ignores_outliers():
    (snippet,) = _blocks("python")
    assert len(snippet.splitlines()) <= 30
    names: dict = {}
    exec(snippet, names)
    task, model = names["task"], names["model"]

    def clean_error(params) -> float:
        return float(jnp.mean((model.apply(params, task.test.inputs) - task.test.targets) ** 2))

    inputs, targets = np.asarray(task.train.inputs), np.asarray(task.train.targets)
    solution, *_ = np.linalg.lstsq(np.concatenate([inputs, np.ones_like(inputs)], axis=1), targets, rcond=None)
    by_squares = {"params": {"Dense_0": {"kernel": jnp.asarray(solution[:1]), "bias": jnp.asarray(solution[1])}}}
    # The minimum of the squared error is 1.5 off, the mean of the outliers. The learned loss must be far below that.
    assert clean_error(names["params"]) < 0.05 * clean_error(by_squares)
