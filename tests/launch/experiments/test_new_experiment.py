"""The guide's new experiment: one short file, which every entry point then knows."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

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


def test_the_guide_s_experiment_is_one_short_file_that_all_entry_points_run(tmp_path: pathlib.Path):
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "guide.md").read_text(), re.MULTILINE | re.DOTALL)
    (source,) = (block for block in blocks if block.startswith('"""cubic:'))
    assert len(source.splitlines()) <= 60

    shutil.copytree(ROOT / "launch", tmp_path / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "launch" / "experiments" / "supervised" / "cubic.py").write_text(source)
    given = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "ML3_JAX_COMPILATION_CACHE": "0",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    done = subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^ *cubic +cubics through points with outliers", done.stdout, re.MULTILINE), done.stdout
    assert "is at meta-step 2: going on to 3" in done.stdout, done.stdout + done.stderr

    run = tmp_path / "run"
    assert all((run / picture).stat().st_size > 1000 for picture in PICTURES)
    content = json.loads((run / "meta_test.json").read_text())
    assert (content["experiment"], content["metric"], len(content["tasks"])) == ("cubic", "mse", 2)
