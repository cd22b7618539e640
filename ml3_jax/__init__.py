"""ml3_jax: meta-learning of loss functions in JAX.

    problem + learned_loss -> make_meta_learner -> run -> loss_params -> adapt, or as_loss_fn in one's own training loop

Source of the method: Bechtle et al., Meta Learning via Learned Loss, ICPR 2020, arXiv:1906.05374.
"""

from importlib import metadata

from ml3_jax import dynamics, estimators, losses, networks, replay, rollout
from ml3_jax.adapt import adapt, baseline
from ml3_jax.checkpoint import restore, save
from ml3_jax.losses import as_loss_fn
from ml3_jax.outer import make_meta_learner
from ml3_jax.problems import model_based, model_learning, supervised
from ml3_jax.types import Adaptation, LearnedLoss, Lives, MetaLearner, MetaState, Metrics, Problem

__version__ = metadata.version("ml3_jax")

__all__ = [
    "Adaptation",
    "LearnedLoss",
    "Lives",
    "MetaLearner",
    "MetaState",
    "Metrics",
    "Problem",
    "adapt",
    "as_loss_fn",
    "baseline",
    "dynamics",
    "estimators",
    "losses",
    "make_meta_learner",
    "model_based",
    "model_learning",
    "networks",
    "replay",
    "restore",
    "rollout",
    "save",
    "supervised",
]
