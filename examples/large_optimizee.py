"""Meta-trains a loss that teaches a transformer of 10 million parameters in four steps, beside tuned cross-entropy."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import ml3_jax
from examples import transformer
from ml3_jax.problems import supervised

MODEL = transformer.Transformer()  # 10 million parameters
STEPS = 4
PLAIN = {"SGD": (optax.sgd, (0.01, 0.03, 0.1, 0.3)), "Adam": (optax.adam, (1e-4, 3e-4, 1e-3, 3e-3))}


def main(
    model: Any = MODEL, rate: float = 0.03, meta_steps: int = 40, tests: int = 8, seed: int = 0, plain: Any = PLAIN
) -> dict[str, float]:
    """Cross-entropy in nats on held-out sequences of new tasks, after four steps on the learned loss and on cross-entropy."""
    loss = ml3_jax.losses.learned_gain_cross_entropy()
    features = ("logit", "label", "progress")
    problem = supervised.make_problem(
        model, transformer.sample_task, supervised.cross_entropy, features=features, layout="classes"
    )
    meta = ml3_jax.make_meta_learner(
        problem,
        loss,
        inner_optimizer=optax.sgd(rate),
        meta_optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
        num_tasks=2,
        tasks_at_once=1,  # a transformer at a time
        inner_steps=STEPS,
    )
    state, _ = meta.run(meta.init(jax.random.key(seed)), meta_steps)
    keys = jax.random.split(jax.random.key(100 + seed), tests)

    def after(fit: Any, *about: Any, optimizer: Any) -> float:
        def of_task(key: jax.Array) -> jax.Array:
            task, options = transformer.sample_task(key), {"optimizer": optimizer, "steps": STEPS, "evaluate_every": STEPS}
            return fit(problem, *about, task, None, key, **options).trace["loss"][-1]

        return float(jnp.mean(jax.lax.map(of_task, keys)))

    found = {f"learned loss, SGD {rate}": after(ml3_jax.adapt, loss, state.loss_params, optimizer=optax.sgd(rate))}
    for name, (make, rates) in plain.items():
        found |= {f"cross-entropy, {name} {rate}": after(ml3_jax.baseline, optimizer=make(rate)) for rate in rates}
    return found


if __name__ == "__main__":
    print({name: round(value, 3) for name, value in main().items()})
