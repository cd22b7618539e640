"""ml3_jax: meta-learning of loss functions in JAX.

    problem + learned_loss -> make_meta_learner -> run -> loss_params -> adapt, or as_loss_fn in your own training loop

Source of the method: Bechtle et al., Meta Learning via Learned Loss, ICPR 2020, arXiv:1906.05374.
"""

from importlib import metadata

from ml3_jax import (
    aliases,
    checkpoint,
    dynamics,
    estimators,
    losses,
    networks,
    optimizers,
    problems,
    replay,
    rollout,
    sharding,
)
from ml3_jax.adaptation import adapt, baseline
from ml3_jax.checkpoint import restore, restore_parts, save
from ml3_jax.losses import as_loss_fn
from ml3_jax.outer import make_meta_learner
from ml3_jax.training import Trained, make_validation, train
from ml3_jax.types import (
    COLLECT_GRADIENTS,
    GRADIENT_MODES,
    OBJECTIVES,
    Adaptation,
    InnerState,
    LearnedLoss,
    MetaLearner,
    MetaParams,
    MetaState,
    Metrics,
    Problem,
)

__version__ = metadata.version("ml3_jax")

__all__ = [
    "COLLECT_GRADIENTS",
    "GRADIENT_MODES",
    "OBJECTIVES",
    "Adaptation",
    "InnerState",
    "LearnedLoss",
    "MetaLearner",
    "MetaParams",
    "MetaState",
    "Metrics",
    "Problem",
    "Trained",
    "adapt",
    "as_loss_fn",
    "baseline",
    "checkpoint",
    "dynamics",
    "estimators",
    "losses",
    "make_meta_learner",
    "make_validation",
    "networks",
    "optimizers",
    "problems",
    "replay",
    "restore",
    "restore_parts",
    "rollout",
    "save",
    "sharding",
    "train",
]

__getattr__ = aliases.module_getattr(__name__)
