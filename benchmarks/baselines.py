"""The plain loss at its best: a step size tuned for each step that a row reports, and for how soon a gain is reached.

A baseline may be several choices, such as SGD with a constant and with a decaying step size; the best of them counts. All is
chosen on draws of its own (`launch.evaluation.draws`) and then shown on those that are tested.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from launch import evaluation, results, tuning

ADAM = "plain_tuned_adam"
Traces = dict[str, np.ndarray]  # {METRIC: [M, K + 1]}


class Choice:
    """One way to descend: its curves on the tuning draw by step size, each computed once."""

    def __init__(self, setting: Any, fn: evaluation.CurveFn, draw: evaluation.Draw):
        """fn: of `launch.evaluation`; draw: what step sizes are tuned on."""
        self._setting, self._fn, self._draw = setting, fn, draw
        self._tuning: dict[float, np.ndarray] = {}
        self._tested: dict[float, Traces] = {}

    def search(self, step: int) -> tuning.Search:
        """The search for the step size that is best after so many steps."""

        def judge(size: float) -> tuple[np.ndarray, np.ndarray]:
            curve = self.tried(size)
            return curve[:, 0], curve[:, step]

        return tuning.Search(judge, maximize=self._setting.maximize)

    def tried(self, size: float) -> np.ndarray:
        """The setting's metric on the tuning draw, [M, K + 1]."""
        if size not in self._tuning:
            self._tuning[size] = self._fn(size, self._draw)[self._setting.metric]
        return self._tuning[size]

    def all_tried(self) -> Mapping[float, np.ndarray]:
        """{step size: `tried`} of all so far."""
        return self._tuning

    def tested(self, size: float, draw: evaluation.Draw) -> Traces:
        """The curves on the tested draw, which is the same at each call."""
        if size not in self._tested:
            self._tested[size] = self._fn(size, draw)
        return self._tested[size]


class Baseline(NamedTuple):
    """A baseline that was tuned for each of S steps."""

    sizes: list[float]  # [S] step sizes
    traces: list[Traces]  # [S] on the tested draw, each at the step size of its step
    choices: list[Choice]

    def soonest(self, gain: float, draw: evaluation.Draw, *, metric: str, maximize: bool) -> np.ndarray | None:
        """The metric on the tested draw at the step size that is first to be `results.GAIN` of this gain better than its start.

        First on the tuning draw, of all step sizes that were tried for any of the steps; None where none is.
        """
        found = []
        for choice in self.choices:
            for size, curve in choice.all_tried().items():
                start = results.mean_curve(curve)[0]
                at = results.steps_to(curve, range(curve.shape[1]), start, gain, maximize=maximize)
                if at is not None and np.isfinite(curve).all():
                    found.append((at, size, choice))
        if not found:
            return None
        _, size, choice = min(found, key=lambda one: one[0])
        return choice.tested(size, draw)[metric]


def tuned(
    setting: Any, config: Any, draws: tuple[evaluation.Draw, evaluation.Draw], steps: Sequence[int], key: Array
) -> dict[str, Baseline]:
    """The plain loss by SGD and by Adam, and from a pretrained optimizee where the setting has one.

    Args:
      setting: what is tested.
      config: the experiment's. Where the learned loss's step size decays, a baseline's may decay alike or stay constant; where
        its optimizer is neither of the baselines', Adam's may be that one.
      draws: (tested, tuned on).
      steps: what is reported, the last one the longest.
      key: of the pretraining.

    Returns:
      {NAME of `launch.evaluation`: its baseline}.
    """
    test, tune = draws
    decays = sorted({0, config.inner_decay_steps})
    names = {name: [optimizer] for name, optimizer in evaluation.TUNED.items()}
    if config.inner_optimizer not in evaluation.TUNED.values():
        names[ADAM].append(config.inner_optimizer)
    fns = {
        name: [plain(setting, optimizer, steps[-1], decay) for optimizer in optimizers for decay in decays]
        for name, optimizers in names.items()
    }
    if setting.pretrain is not None:
        params = setting.pretrain(key)
        fns[evaluation.PRETRAINED] = [evaluation.from_params(fn, params) for fn in itertools.chain(*fns.values())]
    choices = {name: [Choice(setting, fn, tune) for fn in some] for name, some in fns.items()}
    # All that every search begins with, side by side.
    first = [choice.search(steps[-1]) for choice in itertools.chain(*choices.values())]
    tuning.judge_all(first, range(tuning.FIRST, tuning.LAST + 1))
    found = {}
    for name, some in choices.items():
        best = [_best(some, step) for step in steps]
        found[name] = Baseline([size for size, _ in best], [choice.tested(size, test) for size, choice in best], some)
    return found


def plain(setting: Any, optimizer: str, num_steps: int, decay_steps: int) -> evaluation.CurveFn:
    """The descent on the plain loss; the setting has no probe, which would want a learned loss."""
    descent = evaluation.make_descent(setting, None, optimizer, num_steps, decay_steps)
    return lambda size, draw, ends_only=False: descent(size, draw, None, None, ends_only)


def _best(choices: Sequence[Choice], step: int) -> tuple[float, Choice]:
    """(the step size that is best after so many steps, the choice whose it is)."""

    def of_choice(choice: Choice) -> tuple[tuple[float, float], float, Choice]:
        search = choice.search(step)
        best = search.best(tuning.common_range([search]))
        return search.badness(best), tuning.step_size(best), choice

    _, size, choice = min((of_choice(choice) for choice in choices), key=lambda found: found[0])
    return size, choice
