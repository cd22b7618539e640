"""The plain loss with tuned step sizes: one for each reported step, and one for reaching a gain fast.

A baseline has several choices, such as SGD with a constant and with a decaying step size. The best choice counts. Everything is
chosen on the tuning draw (`launch.evaluation.evaluate.draws`) and reported on the tested draw.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from launch import curves as curve_names
from launch.evaluation import evaluate, results, step_size_search

ADAM = "plain_tuned_adam"
Traces = dict[str, np.ndarray]  # {METRIC: [M, K + 1]}


class Choice:
    """One way to descend. It computes its curves once per step size."""

    def __init__(self, scenario: Any, fn: evaluate.CurveFn, draw: evaluate.Draw):
        """fn: a descent of `launch.evaluation`; draw: the tuning draw."""
        self._scenario, self._fn, self._draw = scenario, fn, draw
        self._tuning: dict[float, np.ndarray] = {}
        self._tested: dict[float, Traces] = {}

    def search(self, step: int) -> step_size_search.Search:
        """The search for the step size that is best after `step` steps."""

        def judge(size: float) -> tuple[np.ndarray, np.ndarray]:
            curve = self.tried(size)
            return curve[:, 0], curve[:, step]

        return step_size_search.Search(judge, maximize=self._scenario.maximize)

    def tried(self, size: float) -> np.ndarray:
        """The scenario's metric on the tuning draw, [M, K + 1]."""
        if size not in self._tuning:
            self._tuning[size] = self._fn(size, self._draw)[self._scenario.metric]
        return self._tuning[size]

    def all_tried(self) -> Mapping[float, np.ndarray]:
        """{step size: `tried`} of all step sizes up to now."""
        return self._tuning

    def tested(self, size: float, draw: evaluate.Draw) -> Traces:
        """The curves on the tested draw. It must be the same draw at each call."""
        if size not in self._tested:
            self._tested[size] = self._fn(size, draw)
        return self._tested[size]


class Baseline(NamedTuple):
    """A baseline tuned for each of S steps."""

    sizes: list[float]  # [S] step sizes
    traces: list[Traces]  # [S] on the tested draw, one per step size
    choices: list[Choice]

    def fastest(self, gain: float, draw: evaluate.Draw, *, metric: str, maximize: bool) -> np.ndarray | None:
        """The metric on the tested draw at the step size that reaches `results.GAIN` of a gain in the fewest steps.

        The step size is chosen on the tuning draw, among all that were tried. None if none of them reaches it.
        """
        found = []
        for choice in self.choices:
            for size, curve in choice.all_tried().items():
                start = curve_names.mean_curve(curve)[0]
                at = results.steps_to(curve, range(curve.shape[1]), start, gain, maximize=maximize)
                if at is not None and np.isfinite(curve).all():
                    found.append((at, size, choice))
        if not found:
            return None
        _, size, choice = min(found, key=lambda one: one[0])
        return choice.tested(size, draw)[metric]


def tuned(
    scenario: Any, config: Any, draws: tuple[evaluate.Draw, evaluate.Draw], steps: Sequence[int], key: Array
) -> dict[str, Baseline]:
    """The plain loss with SGD, with Adam, and from a pretrained or meta-trained optimizee if the scenario has one.

    If the learned loss's step size decays, a baseline may use the same decay or a constant step size. If the learned loss's
    optimizer is neither SGD nor Adam, the Adam baseline may use it too.

    Args:
      scenario: the tested scenario.
      config: the experiment's config.
      draws: (tested draw, tuning draw).
      steps: reported steps, in increasing order.
      key: of the controls.

    Returns:
      {curve name of `launch.evaluation`: baseline}.
    """
    test, tune = draws
    decays = sorted({0, config.inner_decay_steps})
    names = {name: [optimizer] for name, optimizer in curve_names.TUNED.items()}
    if config.inner_optimizer not in curve_names.TUNED.values():
        names[ADAM].append(config.inner_optimizer)
    fns = {
        name: [plain(scenario, optimizer, steps[-1], decay) for optimizer in optimizers for decay in decays]
        for name, optimizers in names.items()
    }
    own = list(itertools.chain(*fns.values()))
    controls = {curve_names.PRETRAINED: scenario.pretrain, curve_names.MAML: scenario.maml}
    for name, train_key in zip(controls, (key, jax.random.fold_in(key, 1)), strict=True):
        train = controls[name]
        if train is not None:
            params = train(train_key)
            fns[name] = [evaluate.from_params(fn, params) for fn in own]
    choices = {name: [Choice(scenario, fn, tune) for fn in some] for name, some in fns.items()}
    # The first step sizes of all searches, in parallel.
    first = [choice.search(steps[-1]) for choice in itertools.chain(*choices.values())]
    step_size_search.judge_all(first, range(step_size_search.FIRST, step_size_search.LAST + 1))
    found = {}
    for name, some in choices.items():
        best = [_best(some, step) for step in steps]
        found[name] = Baseline([size for size, _ in best], [choice.tested(size, test) for size, choice in best], some)
    return found


def plain(scenario: Any, optimizer: str, num_steps: int, decay_steps: int) -> evaluate.CurveFn:
    """The descent on the plain loss. The scenario must have no probe: a probe needs a learned loss."""
    descent = evaluate.make_descent(scenario, None, optimizer, num_steps, decay_steps)
    return lambda size, draw, ends_only=False: descent(size, draw, None, None, ends_only)


def _best(choices: Sequence[Choice], step: int) -> tuple[float, Choice]:
    """(best step size after `step` steps, its choice)."""

    def of_choice(choice: Choice) -> tuple[tuple[float, float], float, Choice]:
        search = choice.search(step)
        best = search.best(step_size_search.common_range([search]))
        return search.badness(best), step_size_search.step_size(best), choice

    _, size, choice = min((of_choice(choice) for choice in choices), key=lambda found: found[0])
    return size, choice
