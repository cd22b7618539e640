"""Meta-test: the content of meta_test.json, paired comparisons, and step sizes tuned on other draws."""

import dataclasses
import json
import re
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ml3_jax
from launch import experiments, meta_test, optimizers
from launch.curves import TUNED
from launch.evaluation import evaluate as evaluation
from launch.evaluation import step_size_search, unfinished
from launch.evaluation.probes import gradient_cosine
from launch.experiment import meta_settings
from launch.experiments import saved
from launch.figures import run as figures
from launch.runs import single_run
from tests.launch import line
from tests.launch.conftest import snapshot

CURVES = ["learned", "untrained", "plain_same_lr", "plain_tuned_sgd", "plain_tuned_adam"]
FIELDS = {"metric", "unit", "steps", "tasks", "curves", "success", "step_size", "other_metrics", "env_steps", "sweep", "cost"}


@pytest.fixture(scope="module")
def content(finished):
    def refuse(constant):
        raise AssertionError(f"JSON does not have {constant}")

    return json.loads((finished / "meta_test.json").read_text(), parse_constant=refuse)


def test_the_json_has_the_shapes_of_the_contract(content):
    assert set(content) >= {"experiment", "seed", "variants"} | FIELDS
    assert (content["experiment"], content["metric"], content["unit"]) == ("line", "distance", "m")
    assert set(content["variants"]) == {"noisy"}
    noisy = content["variants"]["noisy"]
    assert set(noisy) >= FIELDS
    for part, names in ((content, CURVES), (noisy, [*CURVES, "pretrained_tuned", "maml"])):
        assert part["steps"] == [0, 1, 2, 3, 4, 5, 6]
        assert len(part["tasks"]) == 12
        assert sorted(part["curves"]) == sorted(part["step_size"]) == sorted(part["sweep"]) == sorted(names)
        assert all(np.shape(curve) == (12, 7) for curve in part["curves"].values())
        for sweep in part["sweep"].values():
            assert len(sweep["step_sizes"]) == len(sweep["final"]) == len(sweep["diverged"]) >= 9
    assert {name: np.shape(curve) for name, curve in content["success"].items()} == dict.fromkeys(CURVES, (7,))
    assert set(content["other_metrics"]) == {"offset_error", "gradient_cosine"}
    assert np.shape(content["other_metrics"]["gradient_cosine"]["plain_same_lr"]) == (12, 7)
    assert content["env_steps"] == {}
    assert content["cost"]["env_steps"] is None
    assert content["cost"]["break_even_tasks"] is None
    assert content["cost"]["seconds"] > 0
    assert noisy["env_steps"]["learned"] == [0, 16, 32, 48, 64, 80, 96]
    assert noisy["success"] == {}


def test_all_curves_start_from_the_same_optimizees_on_the_same_tasks(content):
    starts = [[task[0] for task in content["curves"][name]] for name in CURVES]
    assert all(start == starts[0] for start in starts)
    assert len(set(starts[0])) == 12
    # An optimizee starts near zero, so its distance is about that of the task's (slope, offset) from it.
    np.testing.assert_allclose(starts[0], np.linalg.norm(content["tasks"], axis=1), atol=0.4)


def test_success_and_divergence_are_counted_over_all_tasks(content):
    learned = np.array(content["curves"]["learned"])
    np.testing.assert_allclose(content["success"]["learned"], (learned < 0.5).mean(axis=0))


def test_tuned_step_sizes_lie_strictly_inside_the_range_and_are_the_best_of_it(content):
    for part in (content, content["variants"]["noisy"]):
        for name in ("plain_tuned_sgd", "plain_tuned_adam"):
            sweep, tried = part["sweep"][name], part["schedules_tried"][name]
            chosen = tried["constant"]["step_size"]
            assert sweep["step_sizes"][0] < chosen < sweep["step_sizes"][-1]
            whole = [final for final, diverged in zip(sweep["final"], sweep["diverged"], strict=True) if diverged == 0]
            assert sweep["final"][sweep["step_sizes"].index(chosen)] == tried["constant"]["final"] == min(whole)
            assert set(tried) == set(optimizers.SCHEDULES)
            best = tried[part["schedule"][name]]
            assert best == min(tried.values(), key=lambda one: one["final"])
            assert part["step_size"][name] == best["step_size"]
        assert part["step_size"]["learned"] == part["step_size"]["plain_same_lr"] == 0.1
        assert part["sweep"]["plain_same_lr"] != part["sweep"]["plain_tuned_sgd"]  # its step size decays as the config's


def test_step_sizes_are_tuned_on_other_draws_than_those_tested(content):
    sweep = content["sweep"]["plain_same_lr"]
    tested = np.array(content["curves"]["plain_same_lr"])[:, -1].mean()
    assert abs(sweep["final"][sweep["step_sizes"].index(0.1)] - tested) > 1e-3  # 0.1: the step size of the curve
    scenario = line.scenarios(experiments.build("line"))[""]
    tested_draw, tuning_draw = evaluation.draws(scenario, jax.random.key(5), 12)
    assert not np.any(np.isin(tested_draw.tasks.extra, tuning_draw.tasks.extra))
    keys = [jax.random.key_data(draw.keys).tolist() for draw in (tested_draw, tuning_draw)]
    assert len({tuple(key) for key in keys[0] + keys[1]}) == 24
    assert len(np.unique([draw.params["slope"] for draw in (tested_draw, tuning_draw)])) == 24


def test_a_curve_is_what_the_library_gives_for_its_task_with_a_decaying_step_size(content, finished):
    _, experiment, record = saved.rebuild(finished)
    template = single_run.make_start(experiment, record.seed)
    restored = single_run.restore(finished, template)
    assert restored is not None
    scenario = line.scenarios(experiment)[""]
    key, _ = jax.random.split(jax.random.fold_in(jax.random.key(content["seed"]), 1))
    draw, _ = evaluation.draws(scenario, key, 12)
    task, run_key, params = jax.tree.map(lambda leaf: leaf[7], draw)
    sgd, adam = (
        optimizers.inner(
            name, optimizers.scheduled(content["step_size"][curve], optimizers.SCHEDULES[content["schedule"][curve]], 6)
        )
        for curve, name in TUNED.items()
    )
    given, options = (task, scenario.context, run_key), {"params": params, "steps": 6}
    expected = {
        name: ml3_jax.adapt(
            scenario.problem,
            experiment.learned_loss,
            loss_params,
            *given,
            optimizer=optimizers.inner("sgd", 0.1, decay_steps=3),
            **options,
        )
        for name, loss_params in (("learned", restored[1].loss_params), ("untrained", template.loss_params))
    }
    for name, optimizer in (("plain_tuned_sgd", sgd), ("plain_tuned_adam", adam)):
        expected[name] = ml3_jax.baseline(scenario.problem, *given, optimizer=optimizer, **options)
    for name, out in expected.items():
        np.testing.assert_allclose(content["curves"][name][7], out.trace["distance"], rtol=1e-4)


def test_the_inner_step_size_of_meta_training_decays():
    optimizer = meta_settings(line.LineConfig())["inner_optimizer"]
    state, moves = optimizer.init(jnp.zeros(())), []
    for _ in range(4):
        update, state = optimizer.update(jnp.ones(()), state)
        moves.append(-float(update))
    assert moves[0] == pytest.approx(0.1)
    assert moves[3] == pytest.approx(0.1 * optimizers.DECAY_END)


def test_a_search_evaluates_only_both_ends_of_a_descent_which_may_diverge():
    scenario = line.scenarios(experiments.build("line"))[""]
    own, ran = scenario.problem.evaluate, []

    def evaluate(*args):
        jax.debug.callback(lambda: ran.append(1))
        return own(*args)

    scenario = scenario._replace(problem=scenario.problem._replace(evaluate=evaluate), probe=None, other_metrics=())
    descent = evaluation.make_descent(scenario, None, "sgd", 6)
    draw, _ = evaluation.draws(scenario, jax.random.key(2), 4)

    def curve(step_size, draw, *options):
        return descent(step_size, draw, None, None, *options)

    whole = curve(0.1, draw)["distance"]
    jax.effects_barrier()
    assert len(ran) == 7  # a callback without arguments runs once for all tasks
    sweep = evaluation.make_search(scenario, curve, draw).sweep([-2])
    jax.effects_barrier()
    assert len(ran) == 7 + 2
    assert sweep.final == [pytest.approx(whole[:, -1].mean())]
    assert sweep.start == pytest.approx(whole[:, 0].mean())
    # The plain loss overflows at a step size of 1e18: the curve keeps its start and ends not finite, null in the results.
    diverged = curve(1e18, draw)["distance"]
    assert not np.isfinite(diverged[:, -1]).any()
    np.testing.assert_array_equal(diverged[:, 0], whole[:, 0])


def test_scenarios_that_differ_in_tasks_or_pretraining_share_compiled_descents_of_weakly_typed_initialisations():
    experiment = experiments.build("line")
    scenario = line.scenarios(experiment)[""]
    traced = []

    def weak(key, task):
        return {"slope": 0.1 * jax.random.normal(key), "offset": jnp.full((), 0.0)}

    def counted(*args):
        traced.append(args)
        return scenario.problem.evaluate(*args)

    assert jax.eval_shape(weak, jax.random.key(0), None)["offset"].weak_type
    near = scenario._replace(problem=scenario.problem._replace(init=weak, evaluate=counted))
    far = near._replace(sample_tasks=lambda key, count: scenario.draw_tasks(jax.random.fold_in(key, 1), count), title="far")
    pretrained = near._replace(pretrain=lambda key: {"slope": jnp.zeros(()), "offset": jnp.zeros(())})
    loss_params = single_run.make_start(experiment, 0).loss_params
    tested = {"key": jax.random.key(1), "num_tasks": 2, "steps": 2}
    finals, counts = [], []
    for one in (near, far, pretrained):
        traces = evaluation.evaluate(experiment, one, loss_params, loss_params, **tested).traces
        finals.append(traces["learned"][scenario.metric][:, -1])
        counts.append(len(traced))
    assert counts[0] == counts[1] == counts[2] > 0
    assert not np.any(finals[0] == finals[1])
    assert "pretrained_tuned" in traces


def test_the_cosine_of_a_loss_with_itself_is_one_and_ignores_scale():
    problem = line.make_problem(line.LineConfig())
    mse = ml3_jax.LearnedLoss(
        init=lambda key, features: jnp.ones(()),
        apply=lambda scale, features: scale * jnp.mean((features[:, 0] - features[:, 1]) ** 2),
        spec=None,
    )
    key, context = jax.random.key(0), jnp.linspace(-1.0, 1.0, 16)
    task = problem.sample_task(key, context)
    probe = jax.jit(jax.vmap(gradient_cosine(problem, mse), (0, None, None, None, None)))
    cosines = probe(jnp.array([0.01, 5.0, -5.0]), problem.init(key, task), task, context, key)["gradient_cosine"]
    np.testing.assert_allclose(cosines, [1.0, 1.0, -1.0], atol=1e-5)


def test_flags_choose_tasks_steps_and_draws_and_equal_flags_give_equal_results(run, content, capsys):
    results = []
    for _ in range(2):
        assert meta_test.main(["meta_test", f"--workdir={run}", "--tasks=3", "--steps=2", "--seed=3", "--variants=none"]) == 0
        results.append(json.loads((run / "meta_test.json").read_text()))
    assert results[0] == results[1]
    assert (results[0]["seed"], results[0]["steps"], results[0]["variants"]) == (3, [0, 1, 2], {})
    scenario = line.scenarios(experiments.build("line"))[""]
    key, _ = jax.random.split(jax.random.fold_in(jax.random.key(3), 1))
    np.testing.assert_allclose(results[0]["tasks"], evaluation.draws(scenario, key, 3)[0].tasks.extra, rtol=1e-6)
    assert content["seed"] != 0  # the default seed of meta-training
    assert "learned / it" in capsys.readouterr().out
    assert (run / "figures.txt").read_text() == "line [5]"


def test_the_variants_flag_selects_variants(run, content, monkeypatch, capsys):
    made = line.scenarios

    def scenarios(experiment):
        both = made(experiment)
        return {**both, "slow": both["noisy"]._replace(on_request=True, title="slow")}

    monkeypatch.setattr(line, "DEFINITION", dataclasses.replace(line.DEFINITION, scenarios=scenarios))
    monkeypatch.setattr(meta_test, "_measure", lambda *args: content["variants"]["noisy"])
    monkeypatch.setattr(figures, "meta_test", lambda *args: None)
    before = snapshot(run)
    assert meta_test.main(["meta_test", f"--workdir={run}", "--variants=noisy,slwo"]) == 2
    assert "--variants: unknown variant 'slwo'; did you mean 'slow'? (one of all, noisy, none, slow)" in capsys.readouterr().err
    assert snapshot(run) == before
    found = []
    for flags in ([], ["--variants=all"], ["--variants=slow"], ["--variants=none"]):
        assert meta_test.main(["meta_test", f"--workdir={run}", *flags]) == 0
        found.append(sorted(json.loads((run / "meta_test.json").read_text())["variants"]))
    assert found == [["noisy"], ["noisy", "slow"], ["slow"], []]


def test_a_scenario_with_an_unknown_metric_writes_nothing(run, monkeypatch, capsys):
    def broken(experiment):
        return {"": line.scenarios(experiment)[""]._replace(metric="distnace")}

    monkeypatch.setattr(line, "DEFINITION", dataclasses.replace(line.DEFINITION, scenarios=broken))
    before = snapshot(run)
    assert meta_test.main(["meta_test", f"--workdir={run}"]) == 2
    assert "distnace is missing" in capsys.readouterr().err
    assert snapshot(run) == before


def test_a_config_json_with_a_value_of_the_wrong_type_is_refused(run, capsys):
    record = json.loads((run / "config.json").read_text())
    record["config"]["inner_lr"] = "fast"
    (run / "config.json").write_text(json.dumps(record))
    assert meta_test.main(["meta_test", f"--workdir={run}"]) == 2
    assert "does not fit this version of the code: config field 'inner_lr' must be a number" in capsys.readouterr().err


def test_a_config_json_without_a_field_is_refused_and_gets_no_default(run, capsys):
    record = json.loads((run / "config.json").read_text())
    del record["config"]["inner_decay_steps"]
    (run / "config.json").write_text(json.dumps(record))
    before = snapshot(run)
    assert meta_test.main(["meta_test", f"--workdir={run}"]) == 2
    assert "expected every config field, inner_decay_steps missing" in capsys.readouterr().err
    assert snapshot(run) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_the_finished_settings_and_the_same_command_measures_the_others(
    run, content, number, monkeypatch, capsys
):
    measured, measure = [], meta_test._measure

    def noted(run_, scenario, *args):
        if measured and number is not None:
            signal.raise_signal(number)
        measured.append(scenario.title)
        return measure(run_, scenario, *args)

    monkeypatch.setattr(meta_test, "_measure", noted)
    before = signal.getsignal(number)
    assert meta_test.main(["meta_test", f"--workdir={run}"]) == 128 + number
    assert "1 of 2 settings are measured and kept: the same command goes on from there" in capsys.readouterr().err
    assert signal.getsignal(number) == before
    assert not (run / "meta_test.json").exists()
    number = None
    assert meta_test.main(["meta_test", f"--workdir={run}"]) == 0
    assert "measured already: lines with outliers" in capsys.readouterr().out
    assert measured == ["lines with outliers", "twice the outliers"]
    assert json.loads((run / "meta_test.json").read_text()) == content
    assert not (run / unfinished.FILE).exists()


def test_first_curves_come_before_any_search_and_go_when_all_is_measured(run, content, monkeypatch, capsys):
    seen: dict[str, Any] = {}
    judge_all = step_size_search.judge_all

    def noted(searches, exponents):
        if not seen:
            seen["files"] = {path.name for path in run.iterdir()}
            seen["said"] = capsys.readouterr().out
        return judge_all(searches, exponents)

    monkeypatch.setattr(step_size_search, "judge_all", noted)
    assert meta_test.main(["meta_test", f"--workdir={run}"]) == 0
    assert meta_test.FIRST_CURVES in seen["files"]
    assert "meta_test.png" not in seen["files"]
    assert "meta_test.json" not in seen["files"]
    for name in ("learned", "untrained", "plain_same_lr", "first curves: ", "next: step sizes of the plain loss; twice the"):
        assert name in seen["said"]
    assert "plain_tuned" not in seen["said"]
    assert re.search(r"descent 162/162 +[\d.]+ descents/s", capsys.readouterr().out)
    assert not (run / meta_test.FIRST_CURVES).exists()
    assert json.loads((run / "meta_test.json").read_text()) == content


def test_finished_settings_of_another_learned_loss_are_measured_again(run, monkeypatch):
    monkeypatch.setattr(meta_test, "_write", lambda *args: signal.raise_signal(signal.SIGTERM))  # all is measured, none written
    with pytest.raises(KeyboardInterrupt):
        meta_test.measure(run, tasks=2, steps=2, variants="none")
    assert (run / unfinished.FILE).exists()
    measured = []
    monkeypatch.setattr(meta_test, "_measure", lambda *args: measured.append(args) or {})
    monkeypatch.setattr(meta_test, "_write", lambda *args: {})
    loaded = saved.load(run)
    other = loaded._replace(learned=jax.tree.map(lambda leaf: leaf + 1.0, loaded.learned))
    for found, expected in ((loaded, 0), (other, 1)):
        before = (run / unfinished.FILE).read_bytes()
        monkeypatch.setattr(saved, "load", lambda folder, found=found: found)
        measured.clear()
        meta_test.measure(run, tasks=2, steps=2, variants="none")
        assert len(measured) == expected
        (run / unfinished.FILE).write_bytes(before)


def test_settings_of_other_flags_or_of_half_a_file_are_measured_again(run):
    kept = unfinished.Unfinished(run, {"seed": 1})
    kept.add("", {"curve": [1.0]})
    assert unfinished.Unfinished(run, {"seed": 1}).parts == {"": {"curve": [1.0]}}
    assert unfinished.Unfinished(run, {"seed": 2}).parts == {}
    file = run / unfinished.FILE
    file.write_text(file.read_text()[:-9])
    assert unfinished.Unfinished(run, {"seed": 1}).parts == {}


def test_a_search_around_a_guess_widens_until_the_best_step_size_lies_inside():
    for best, guess in ((-2, -2), (-6, -2), (3, -2)):
        search = step_size_search.Search(lambda size, best=best: (np.ones(1), np.abs(np.log10([size]) - best / 2)))
        assert step_size_search.around(search, guess) == best
    falling = step_size_search.Search(lambda size: (np.ones(1), np.array([size])))
    assert step_size_search.around(falling, -2) == step_size_search.LOWEST
    flat = step_size_search.Search(lambda size: (np.ones(1), np.ones(1)))
    assert step_size_search.around(flat, -2) == -2


def test_a_step_size_that_decays_itself_takes_no_schedule():
    scenario = line.scenarios(experiments.build("line"))[""]
    descent = evaluation.make_descent(scenario, None, "sgd", 6, decay_steps=3)
    with pytest.raises(ValueError, match="expected 'constant' for step sizes that decay themselves, got 'cosine'"):
        descent(0.1, evaluation.draws(scenario, jax.random.key(2), 4)[0], None, None, False, "cosine")
