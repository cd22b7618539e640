"""The curves of meta-test: their names, which are keys of meta_test.json, and their mean over tasks."""

from typing import Any

import numpy as np

LEARNED = "learned"
UNTRAINED = "untrained"  # the learned loss as initialised
SAME_LR = "plain_same_lr"
TUNED = {"plain_tuned_sgd": "sgd", "plain_tuned_adam": "adam"}  # curve -> inner optimizer
PRETRAINED = "pretrained_tuned"
CONTEXT_POLICY = "context_policy"  # one policy that reads all earlier transitions of its task
MAML = "maml"  # the plain loss from a meta-learned initialisation, tuned
PPO = "ppo"


def mean_curve(curve: Any) -> np.ndarray:
    """Mean over the finite values of the first axis; NaN where there are none."""
    values = np.array(curve, dtype=np.float64)  # null becomes NaN
    finite = np.isfinite(values)
    count = finite.sum(axis=0)
    return np.where(count, np.where(finite, values, 0.0).sum(axis=0) / np.maximum(count, 1), np.nan)
