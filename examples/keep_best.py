"""Keeps the learned loss that is best on validation tasks, and sends metrics to a logger of your own."""

from typing import Any

import jax
import optax

import ml3_jax
from examples import outliers
from ml3_jax.problems import supervised


def main(steps: int = 500) -> tuple[ml3_jax.Trained, list[dict[str, float]]]:
    """Returns the result of the training and what the logger got."""
    problem = supervised.make_problem(outliers.MODEL, outliers.sample_task)
    loss = ml3_jax.losses.mlp(hidden=(32, 32), activation="elu", bias=True)
    optimizer = optax.sgd(0.3)
    meta = ml3_jax.make_meta_learner(
        problem, loss, inner_optimizer=optimizer, meta_optimizer=optax.adam(1e-2), num_tasks=16, inner_steps=20
    )
    # The loss is judged after more steps than it was meta-trained for.
    validate = ml3_jax.make_validation(problem, loss, "loss", jax.random.key(5), optimizer=optimizer, steps=40)
    rows: list[dict[str, float]] = []

    def log(step: int, metrics: Any) -> None:  # or wandb.log(dict(metrics), step=step)
        rows.append({"step": step, **metrics})
        print(f"meta-step {step}: task loss {metrics['task_loss']:.4f}, validation {metrics['validation']:.4f}")

    trained = ml3_jax.train(meta, meta.init(jax.random.key(0)), steps, every=50, callback=log, validate=validate)
    print(f"best: {trained.best_value:.4f} at meta-step {trained.best_step}")
    return trained, rows


if __name__ == "__main__":
    main()
