"""The plain loss with tuned step sizes: one for each reported step, and one for reaching a gain fast.

A baseline has several choices: constant step sizes, those that decay as the learned loss's do, and for each reported step the
schedules of `launch.optimizers.SCHEDULES` over this many steps. The best choice counts. Everything is chosen on the tuning draw
(`launch.evaluation.evaluate.draws`) and reported on the tested draw.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from launch import curves as curve_names
from launch import optimizers
from launch.evaluation import evaluate, results, step_size_search

ADAM = "plain_tuned_adam"
Traces = dict[str, np.ndarray]  # {METRIC: [M, K + 1]}


class Choice:
    """One way to descend. It computes its curves once per step size."""

    def __init__(self, scenario: Any, fn: evaluate.CurveFn, draw: evaluate.Draw, schedule: str = optimizers.CONSTANT):
        """fn: a descent of `launch.evaluation`; draw: the tuning draw; schedule: of the step sizes, over all steps of fn."""
        self._scenario, self._fn, self._draw, self.schedule = scenario, fn, draw, schedule
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
            self._tuning[size] = self._fn(size, self._draw, False, self.schedule)[self._scenario.metric]
        return self._tuning[size]

    def all_tried(self) -> Mapping[float, np.ndarray]:
        """{step size: `tried`} of all step sizes up to now."""
        return self._tuning

    def tested(self, size: float, draw: evaluate.Draw) -> Traces:
        """The curves on the tested draw. It must be the same draw at each call."""
        if size not in self._tested:
            self._tested[size] = self._fn(size, draw, False, self.schedule)
        return self._tested[size]


class Baseline(NamedTuple):
    """A baseline tuned for each of S steps."""

    sizes: list[float]  # [S] step sizes
    schedules: list[str]  # [S] names in `launch.optimizers.SCHEDULES`
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
    ways = {name: [_Way(scenario, optimizer, decay) for optimizer in some for decay in decays] for name, some in names.items()}
    own = list(itertools.chain(*ways.values()))
    controls = {curve_names.PRETRAINED: scenario.pretrain, curve_names.MAML: scenario.maml}
    for name, train_key in zip(controls, (key, jax.random.fold_in(key, 1)), strict=True):
        train = controls[name]
        if train is not None:
            params = train(train_key)
            ways[name] = [way._replace(params=params) for way in own]
    constant = {name: [Choice(scenario, way.fn(steps[-1]), tune) for way in some] for name, some in ways.items()}
    # The first step sizes of all searches, in parallel.
    first = [choice.search(steps[-1]) for choice in itertools.chain(*constant.values())]
    step_size_search.judge_all(first, range(step_size_search.FIRST, step_size_search.LAST + 1))
    found = {}
    for name, some in ways.items():
        best = [_best(scenario, constant[name], some, step, tune) for step in steps]
        tried = [*constant[name], *(choice for _, choice in best if choice not in constant[name])]
        traces = [choice.tested(size, test) for size, choice in best]
        found[name] = Baseline([size for size, _ in best], [choice.schedule for _, choice in best], traces, tried)
    return found


class _Way(NamedTuple):
    """An optimizer of the plain loss, with a decay of its own or without, and the optimizee that it starts from."""

    scenario: Any
    optimizer: str
    decay_steps: int
    params: Any = None  # None: those of the draw

    def fn(self, num_steps: int) -> evaluate.CurveFn:
        """The descent of `num_steps` steps."""
        fn = plain(self.scenario, self.optimizer, num_steps, self.decay_steps)
        return fn if self.params is None else evaluate.from_params(fn, self.params)


def plain(scenario: Any, optimizer: str, num_steps: int, decay_steps: int = 0) -> evaluate.CurveFn:
    """The descent on the plain loss. The scenario must have no probe: a probe needs a learned loss."""
    descent = evaluate.make_descent(scenario, None, optimizer, num_steps, decay_steps)
    return lambda size, draw, *options: descent(size, draw, None, None, *options)


def _best(
    scenario: Any, constant: Sequence[Choice], ways: Sequence[_Way], step: int, draw: evaluate.Draw
) -> tuple[float, Choice]:
    """(best step size after `step` steps, its choice), of the constant choices and of the schedules over `step` steps.

    A schedule is tried around the best step size of the best constant choice, with the optimizer of this choice.
    """
    found = []
    for choice in constant:
        search = choice.search(step)
        best = search.best(step_size_search.common_range([search]))
        found.append((search.badness(best), best, choice))
    _, first, winner = min(found, key=lambda one: one[0])
    fn = ways[constant.index(winner)]._replace(decay_steps=0).fn(step)
    for name in optimizers.SCHEDULES:
        if name != optimizers.CONSTANT:
            choice = Choice(scenario, fn, draw, name)
            search = choice.search(step)
            best = step_size_search.around(search, first)
            found.append((search.badness(best), best, choice))
    _, best, choice = min(found, key=lambda one: one[0])
    return step_size_search.step_size(best), choice
