"""The timed code is right, and a long inner loop needs little memory. No test reads a clock."""

import json

from benchmarks import meta_step, report


def test_every_implementation_computes_the_same_task_loss_and_meta_gradient():
    rows = meta_step.agreement(num_tasks=7, inner_steps=3)
    assert {row["implementation"] for row in rows} >= {meta_step.PLAIN}
    for row in rows:
        assert row["task_loss_error"] < 1e-5, row
        assert row["gradient_error"] < 1e-3, row


def test_temporaries_of_200_inner_steps_stay_below_15_mb():
    megabytes = meta_step.temporaries_mb(10, 200)
    assert megabytes[meta_step.STEP] <= 15.0
    assert megabytes[meta_step.PLAIN] > 100.0  # so that the first bound means something
    assert megabytes[meta_step.NESTED] < 0.5 * megabytes[meta_step.STEP]


def test_temporaries_of_the_nested_mode_grow_as_the_root_of_the_inner_steps():
    few, many = (meta_step.temporaries_mb(10, steps, only=meta_step.NESTED)[meta_step.NESTED] for steps in (100, 1000))
    assert many <= 8.0
    assert many < 2.0 * few  # 10 times as many steps


def test_the_report_has_one_row_per_timing(tmp_path):
    spread = {"median": 2.0, "low": 1.5, "high": 2.5, "least": 1.0}
    timing = {"tasks": 10, "inner_steps": 1, "implementation": meta_step.STEP, "ms": spread, "speed": {meta_step.PLAIN: spread}}
    agreed = {"tasks": 10, "inner_steps": 1, "implementation": meta_step.PLAIN, "task_loss": 3.25, "task_loss_error": 0.0}
    results = {
        "command": "python -m benchmarks.meta_step",
        "machine": {"cpu": "a processor", "cores": 2, "devices": 2, "backend": "cpu", "load_average": 0.0},
        "versions": {"jax": "0.10.2"},
        "rounds": 1,
        "torch": False,
        "timings": [timing],
        "agreement": [{**agreed, "gradient_error": 1e-6}],
        "temporaries": {"tasks": 10, "inner_steps": 200, "mb": {meta_step.STEP: 9.0}},
    }
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    text = report.write(path)
    assert path.with_suffix(".md").read_text() == text
    assert "| 10 x 1 | ml3_jax step | 2 [1.5, 2.5] | 2 [1.5, 2.5] |" in text
    assert report.NO_TORCH in text
    assert "ml3_jax step 9.0 MB" in text
