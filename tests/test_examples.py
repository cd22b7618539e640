"""The examples run, are short, and do what they say."""

import importlib
import pathlib
import subprocess
import sys

import optax
import pytest

from examples import keep_best, large_optimizee, outliers, transformer

FOLDER = pathlib.Path(outliers.__file__).parent
LOOPS = {"optax_loop": None, "flax_train_state": None, "flax_nnx": "make_model", "equinox_loop": "make_model"}


def test_every_example_is_short_and_tested():
    files = {path.stem: path.read_text() for path in FOLDER.glob("*.py")}
    assert set(files) == {"__init__", "outliers", "keep_best", "transformer", "large_optimizee", *LOOPS}
    assert all(len(text.splitlines()) < 60 for text in files.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_of_another_library_descends_the_learned_loss(name: str):
    module = importlib.import_module(f"examples.{name}")
    make_model = LOOPS[name]
    learned = outliers.meta_train() if make_model is None else outliers.meta_train(getattr(module, make_model))
    errors = outliers.compare(module.fit, learned)
    assert errors["learned loss"] < 0.02 * errors["squared error"]


@pytest.mark.slow
def test_the_best_loss_is_kept_and_the_logger_gets_the_metrics():
    trained, rows = keep_best.main()
    assert [row["step"] for row in rows] == list(range(50, 501, 50))
    assert trained.best_value == min(row["validation"] for row in rows)
    assert trained.best_value is not None
    assert trained.best_value < 0.1


@pytest.mark.slow
def test_an_example_runs_from_the_command_line():
    command = [sys.executable, "-m", "examples.optax_loop"]
    done = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("{'squared error': ")


@pytest.mark.slow
def test_a_loss_for_transformers_teaches_a_small_one_more_in_four_steps_than_cross_entropy_at_its_best_step_size():
    small, rates = transformer.Transformer(64, 2), {"SGD": (optax.sgd, (0.1, 0.3, 1.0))}
    learned, *plain = large_optimizee.main(small, rate=0.1, meta_steps=60, plain=rates).values()
    assert learned < 0.9 * min(plain)
