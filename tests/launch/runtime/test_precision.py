"""The precision of matrix products: in config.json, in the programs of an experiment, and in no program of the caller."""

import json
import os
import threading

import jax
import jax.numpy as jnp
import pytest

from launch import experiments, meta_test, meta_train
from launch.evaluation import evaluate
from launch.runtime import precision, thread_pool

OF_NAME = {"tensorfloat32": "precision = [HIGH, HIGH]", "float32": "precision = [HIGHEST, HIGHEST]"}


def program(function, *args) -> str:
    """The StableHLO of a function."""
    return jax.jit(function).lower(*args).as_text()


def products(text: str) -> set[str]:
    """The matrix products of a program, without their operands."""
    return {line.split("dot_general")[1] for line in text.splitlines() if "dot_general" in line}


@pytest.mark.parametrize("name", OF_NAME)
def test_the_products_of_an_experiments_programs_have_its_precision_and_those_of_the_caller_do_not(name):
    with jax.default_matmul_precision("default"):
        experiment = experiments.build("line", {"precision": name})
        state = experiment.meta.init(jax.random.key(0), experiment.context)
        for function in (experiment.meta.step, lambda state: experiment.meta.run(state, 2)):
            found = products(program(function, state))
            assert found
            assert all(OF_NAME[name] in product for product in found)
        assert precision.current() == "default"
        (own,) = products(program(lambda x: x @ x, jnp.ones((2, 2))))
        assert "HIGH" not in own


def test_the_default_is_the_setting_of_jax():
    with jax.default_matmul_precision("tensorfloat32"):
        experiment = experiments.build("line")
        state = experiment.meta.init(jax.random.key(0), experiment.context)
        assert all(OF_NAME["tensorfloat32"] in product for product in products(program(experiment.meta.step, state)))


def test_products_are_in_float32_in_tests_and_in_the_processes_that_they_start():
    (product,) = products(program(lambda x: x @ x, jnp.ones((2, 2))))
    assert OF_NAME["float32"] in product
    assert os.environ["JAX_DEFAULT_MATMUL_PRECISION"] == "highest"


def test_a_run_folder_keeps_its_precision_and_its_meta_test_uses_it(tmp_path, monkeypatch):
    folder, seen = tmp_path / "run", []
    assert meta_train.main(["", "--experiment=line", f"--workdir={folder}", "--config.precision=tensorfloat32"]) == 0
    assert json.loads((folder / "config.json").read_text())["config"]["precision"] == "tensorfloat32"
    inside = evaluate.evaluate

    def watched(*args, **kwargs):
        seen.append(precision.current())
        return inside(*args, **kwargs)

    monkeypatch.setattr(evaluate, "evaluate", watched)
    meta_test.measure(folder, tasks=2, steps=2, variants="none")
    assert seen == ["tensorfloat32"]
    assert precision.current() == "highest"


def test_threads_of_a_pool_have_the_precision_of_the_caller():
    def setting(item: int, stop: threading.Event) -> str | None:
        return precision.current()

    with precision.products("tensorfloat32"):
        assert thread_pool.run(setting, range(3), most=2) == ["tensorfloat32"] * 3
    assert thread_pool.run(setting, range(3), most=2) == ["highest"] * 3


def test_the_config_sets_the_type_of_the_inner_loop():
    experiment = experiments.build("line", {"compute_dtype": "bfloat16"})
    state = experiment.meta.init(jax.random.key(0), experiment.context)
    found = products(program(experiment.meta.step, state))
    assert any("bf16" in product for product in found)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.loss_params)} == {"float32"}
