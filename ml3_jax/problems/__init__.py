"""Families of problems, one module each: they build a `Problem` and know nothing of the loops."""

from ml3_jax.problems import inverse_dynamics, model_based, model_free, model_learning, shaped, supervised

__all__ = ["inverse_dynamics", "model_based", "model_free", "model_learning", "shaped", "supervised"]
