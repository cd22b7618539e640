"""The guide's new experiment: one short file, which every entry point then knows."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[3]
PICTURES = ("meta_train.png", "meta_test.png", "step_sizes.png")
# In one process: importing JAX takes longer than most of these commands.
SCRIPT = """
    from launch import meta_test, meta_train

    small = ["--config.inner_steps=2", "--config.num_tasks=2", "--config.log_every=1", "--config.save_every=1"]
    run = ["meta_train", "--experiment=cubic", "--workdir=run", *small]
    for arguments in (["meta_train", "--list"], [*run, "--meta_steps=2"], [*run, "--meta_steps=3"]):
        assert meta_train.main(arguments) == 0
    assert meta_test.main(["meta_test", "--workdir=run", "--tasks=2", "--steps=2"]) == 0
"""


def run_with_the_guide_s_file(script: str, folder: pathlib.Path, **variables: str) -> str:
    """Copies launch with the guide's file in place to a folder, runs a script there, and returns its output."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "guide.md").read_text(), re.MULTILINE | re.DOTALL)
    (source,) = (block for block in blocks if block.startswith('"""cubic:'))
    assert len(source.splitlines()) <= 60
    shutil.copytree(ROOT / "launch", folder / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "launch" / "experiments" / "supervised" / "cubic.py").write_text(source)
    path = os.pathsep.join([str(folder), str(ROOT)])
    given = {**os.environ, "PYTHONPATH": path, "ML3_JAX_COMPILATION_CACHE": "0", "JAX_PLATFORMS": "cpu", **variables}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_guide_s_experiment_is_one_short_file_that_all_entry_points_run(tmp_path: pathlib.Path):
    output = run_with_the_guide_s_file(SCRIPT, tmp_path, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert re.search(r"^ *cubic +cubics through points with outliers", output, re.MULTILINE), output
    assert "is at meta-step 2: going on to 3" in output
    run = tmp_path / "run"
    assert all((run / picture).stat().st_size > 1000 for picture in PICTURES)
    content = json.loads((run / "meta_test.json").read_text())
    assert (content["experiment"], content["metric"], len(content["tasks"])) == ("cubic", "mse", 2)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_the_guide_s_experiment_beats_the_plain_loss_at_its_tuned_step_sizes(seed: int, tmp_path: pathlib.Path):
    arguments = ["meta_train", "--experiment=cubic", "--workdir=run", "--meta_test", f"--seed={seed}"]
    run_with_the_guide_s_file(f"from launch import meta_train; assert meta_train.main({arguments}) == 0", tmp_path)
    curves = json.loads((tmp_path / "run" / "meta_test.json").read_text())["curves"]
    final = {name: sum(task[-1] for task in tasks) / len(tasks) for name, tasks in curves.items()}
    assert final["learned"] < 0.5 * min(final["plain_tuned_sgd"], final["plain_tuned_adam"]), final
