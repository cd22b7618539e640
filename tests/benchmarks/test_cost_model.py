"""The cost model of a meta-step on many devices, and the benchmark that measures its parameters."""

import json
import math

import pytest

from benchmarks import cost_model, processes, scale_tables

COMPUTE = cost_model.Compute(fixed=1.0, task=0.5, phi_bytes=1000)
NETWORK = cost_model.Network(latency=0.1, bandwidth=1e4)


def test_a_meta_step_is_the_largest_share_of_the_tasks_and_an_all_reduce():
    assert cost_model.seconds(COMPUTE, NETWORK, 10, 1) == pytest.approx(1.0 + 0.5 * 10)
    # 4 devices: 3 tasks on the fullest one, 2 hops, 2 * 3/4 * 1000 bytes
    assert cost_model.seconds(COMPUTE, NETWORK, 10, 4) == pytest.approx(1.0 + 0.5 * 3 + 0.2 + 0.15)


def test_the_efficiency_of_one_device_is_one_and_falls_with_more():
    shares = [cost_model.efficiency(COMPUTE, NETWORK, 64, count) for count in (1, 2, 8, 64, 1024)]
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)


def test_the_parameters_are_found_from_times_that_the_model_makes():
    few, many = ((count, cost_model.seconds(COMPUTE, NETWORK, count, 1)) for count in (4, 100))
    found = cost_model.from_two(few, many, 1000)
    assert (found.fixed, found.task) == (pytest.approx(1.0), pytest.approx(0.5))
    times = {size: cost_model.all_reduce(NETWORK, size, 4) for size in (4000, 4_000_000)}
    network = processes.network(times, 4)
    assert (network.latency, network.bandwidth) == (pytest.approx(0.1), pytest.approx(1e4))


@pytest.mark.slow
def test_the_benchmark_measures_every_program_and_its_tables_show_it(monkeypatch, tmp_path):
    works = {"small": processes.Work("sine", 4, 1), "smaller": processes.Work("sine", 2, 1)}
    monkeypatch.setattr(processes, "FEW", {"small": "smaller"})
    monkeypatch.setattr(processes, "IN_PROCESSES", ("small",))
    monkeypatch.setattr(processes, "PROGRAMS", (processes.ONE, processes.Program(1, 2), processes.Program(2, 1)))
    # The workers are processes of their own: they know the works by what they are asked.
    monkeypatch.setattr(processes, "WORKS", works)
    content = processes.measure(rounds=1, seconds=0.01)
    assert set(content["works"]["small"]["ms"]) == {"1 x 1", "1 x 2", "2 x 1"}
    assert all(value > 0 and math.isfinite(value) for value in content["works"]["small"]["predicted_ms"].values())
    path = tmp_path / "processes.json"
    path.write_text(json.dumps({"device": "d", "jax": "j", "rounds": 1, **content}))
    monkeypatch.setattr(processes, "RESULTS", path)
    assert "| small | measured, ms |" in scale_tables.measured()
    assert "| small | 4 |" in scale_tables.predictions()
