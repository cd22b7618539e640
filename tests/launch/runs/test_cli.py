"""The entry points on a command line: misuse ends with exit code 2, one line that helps, and nothing written."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from launch import experiments, meta_test, meta_train
from launch.runs import dry_run, metrics_log
from tests.launch.conftest import ARGS, snapshot

ROOT = pathlib.Path(__file__).parents[3]
NO_RUN = [
    (["--workdir={new}"], "--experiment is missing: pass --experiment="),
    (["--experiment=line"], "--workdir is missing: pass --workdir="),
    (["--experiment=line", "--workdir="], "--workdir is missing"),
    (["--experiment=lin", "--workdir={new}"], "unknown experiment 'lin'; did you mean 'line'?"),
    (["--experiment=line", "--workdir={new}", "--sede=1"], "unknown flag '--sede'; did you mean '--seed'?"),
    (["--experiment=line", "--workdir={new}", "--seed=x"], "--seed must be a whole number, got 'x'"),
    (["--experiment=line", "--workdir={new}", "--seed=-1"], "--seed must be from 0 to"),
    (["--experiment=line", "--workdir={new}", "--seeds=1,x"], "--seeds must be whole numbers with commas between"),
    (["--experiment=line", "--workdir={new}", "--seeds="], "--seeds must be whole numbers with commas between"),
    (["--experiment=line", "--workdir={new}", "--seeds=1,4294967296"], "--seeds must be from 0 to 4294967295, got 4294967296"),
    (["--experiment=line", "--workdir={new}", "--seeds=1,2,1"], "--seeds must differ from each other, got '1,2,1'"),
    (["--experiment=line", "--workdir={new}", "--seeds=1", "--seed=0"], "--seed and --seeds exclude each other"),
    (["--experiment=line", "--workdir={new}", "--num_processes=2"], "--coordinator_address, --process_id missing"),
    (["--experiment=line", "--workdir={new}", "--num_processes=x"], "--num_processes must be a whole number, got 'x'"),
    (
        ["--experiment=line", "--workdir={new}", "--coordinator_address=here", "--num_processes=2", "--process_id=0"],
        "--coordinator_address must be HOST:PORT, got 'here'",
    ),
    (
        ["--experiment=line", "--workdir={new}", "--coordinator_address=h:1", "--num_processes=0", "--process_id=0"],
        "--num_processes must be at least 1, got 0",
    ),
    (
        ["--experiment=line", "--workdir={new}", "--coordinator_address=h:1", "--num_processes=2", "--process_id=2"],
        "--process_id must be from 0 to 1, one less than --num_processes, got 2",
    ),
    (["--experiment=line", "--workdir={new}", "--meta_steps=0"], "--meta_steps must be from 1 to 2147483647, got 0"),
    (["--experiment=line", "--workdir={new}", "--meta_steps=1.5"], "--meta_steps must be a whole number, got '1.5'"),
    (["--experiment=line", "--workdir={new}", "--meta_steps"], "--meta_steps needs a value"),
    (["--experiment=line", "--workdir={new}", "stray"], "unexpected argument 'stray'"),
    (["--experiment=line", "--workdir={new}", "--meta_steps=3", "--config.meta_steps=4"], "differ: pass one of them"),
    (["--experiment=line", "--workdir={new}", "--config.numtasks=4"], "'numtasks'; did you mean 'num_tasks'?"),
    (["--experiment=line", "--workdir={new}", "--config.num_tasks=4.5"], "'num_tasks' must be a whole number, got '4.5'"),
    (["--experiment=line", "--workdir={new}", "--config.num_tasks=-4"], "'num_tasks' must be at least 1, got -4"),
    (["--experiment=line", "--workdir={new}", "--config.inner_lr=nan"], "'inner_lr' must be finite (in float32), got nan"),
    (["--experiment=line", "--workdir={new}", "--config.inner_lr=x"], "'inner_lr' must be a number, got 'x'"),
    (["--experiment=line", "--workdir={new}", "--config.extra=maybe"], "'extra' must be True or False, got 'maybe'"),
    (["--experiment=line", "--workdir={new}", "--config.unroll=3"], "'unroll' must divide inner_steps = 4"),
    (["--experiment=line", "--workdir={new}", "--config=3"], "--config takes one field at a time"),
    (["--experiment=ant_mfrl", "--workdir={new}", "--config.share_samples=True"], "pass --config.reuse_rollouts=VALUE"),
    (["--workdir={new}", "--config.inner_lr=1"], "--config.inner_lr needs --experiment=NAME"),
    (["--experiment=line", "--workdir={new}", "--config.broken=observe"], "observe"),
    (["--experiment=line", "--workdir={new}", "--config.broken=nan"], "finite"),
    (["--experiment=line", "--workdir={file}"], "is a file"),
    (["--experiment=line", "--workdir={file}/below/it"], "which is a file"),
    (["--experiment=line", "--workdir={new}/" + "x" * 300], "has a name of over 255 bytes"),
    (["--experiment=line", "--workdir={new}\0"], "has a null byte"),
    (["--experiment=line", "--workdir={new}" + os.fsdecode(b"\xff")], "has bytes that are not UTF-8"),
    (["--experiment=", "--workdir={new}"], "--experiment is missing"),
    (["--experiment= line", "--workdir={new}"], "unknown experiment ' line'; did you mean 'line'?"),
    (["--experiment=Line", "--workdir={new}"], "unknown experiment 'Line'; did you mean 'line'?"),
    (["--experiment=line\u00e9", "--workdir={new}"], "unknown experiment 'line\u00e9'; did you mean 'line'?"),
    (["line", "--workdir={new}"], "unexpected argument 'line'"),
    (["--experiment=line", "--workdir={new}", "--seed="], "--seed must be a whole number, got ''"),
    (["--experiment=line", "--workdir={new}", "--seed=1e400"], "--seed must be a whole number, got '1e400'"),
    (["--experiment=line", "--workdir={new}", "--seed=4294967296"], "--seed must be from 0 to 4294967295, got 4294967296"),
    (["--experiment=line", "--workdir={new}", "--meta_steps=2147483648"], "--meta_steps must be from 1 to 2147483647"),
    (["--experiment=line", "--workdir={new}", "--meta_steps=1e3"], "--meta_steps must be a whole number, got '1e3'"),
    (["--experiment=line", "--workdir={new}", "--meta_steps=True"], "--meta_steps must be a whole number, got 'True'"),
    (["--experiment=line", "--workdir={new}", "--meta_test=perhaps"], "--meta_test must be True or False, got 'perhaps'"),
    (["--list=maybe"], "--list must be True or False, got 'maybe'"),
    (["--experiment=line", "--workdir={new}", "-x"], "unknown flag '--x'"),
    (["--experiment=line", "--workdir={new}", "---seed=1"], "unknown flag '---seed'; did you mean '--seed'?"),
    (["--experiment=line", "--workdir={new}", "--log_every=3"], "unknown flag '--log_every'"),
    (["--experiment=line", "--workdir={new}", "--config."], "unknown config field ''"),
    (["--experiment=line", "--workdir={new}", "--config.inner_lr"], "--config.inner_lr needs a value"),
    (["--experiment=line", "--workdir={new}", "--config.inner_lr="], "'inner_lr' must be a number, got ''"),
    (["--experiment=line", "--workdir={new}", "--config.inner_lr=inf"], "'inner_lr' must be finite (in float32), got inf"),
    (["--experiment=line", "--workdir={new}", "--config.inner_lr=1e39"], "'inner_lr' must be finite (in float32), got 1e+39"),
    (["--experiment=line", "--workdir={new}", "--config.inner_lr=-1"], "'inner_lr' must be above 0, got -1.0"),
    (["--experiment=line", "--workdir={new}", "--config.meta_lr=0"], "'meta_lr' must be above 0, got 0"),
    (["--experiment=line", "--workdir={new}", "--config.inner_steps=0"], "'inner_steps' must be at least 1, got 0"),
    (["--experiment=line", "--workdir={new}", "--config.num_tasks=" + "9" * 400], "'num_tasks' must be at most 2147483647"),
    (["--experiment=line", "--workdir={new}", "--config.hidden=(0,)"], "'hidden' must be at least 1, got 0"),
    (["--experiment=line", "--workdir={new}", "--config.hidden=(3,"], "'hidden' must be a list of values, each a whole number"),
    (["--experiment=line", "--workdir={new}", "--config.hidden=('a',)"], "'hidden' must be a whole number, got 'a'"),
    (["--experiment=line", "--workdir={new}", "--config.inner_optimizer=adm"], "unknown value 'adm'; did you mean 'adam'?"),
    (["--experiment=line", "--workdir={new}", "--config.gradient=Mixed"], "unknown value 'Mixed'; did you mean 'mixed'?"),
    (["--experiment=line", "--workdir={new}", "--config.objective="], "unknown value ''"),
    (
        ["--experiment=line", "--workdir={new}", "--config.save_every=7"],
        "'save_every' must be a multiple of log_every = 5",
    ),
    (["--experiment=line", "--workdir={new}", "--config.log_every=0"], "'log_every' must be at least 1, got 0"),
    (["--experiment=line", "--workdir={new}", "--config.max_skipped=0"], "'max_skipped' must be at least 1, got 0"),
]


@pytest.mark.parametrize(("arguments", "message"), NO_RUN, ids=[case[1][:50] for case in NO_RUN])
def test_misuse_of_meta_train_is_one_line_and_writes_nothing(arguments, message, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    before = snapshot(tmp_path)
    paths = {"new": tmp_path / "new", "file": tmp_path / "file"}
    assert meta_train.main(["meta_train", *(argument.format(**paths) for argument in arguments)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["naïve 文件", "a b", "quote'\"", "$HOME", "-dash"])
def test_any_name_of_a_run_folder_is_taken(name, tmp_path, capsys):
    assert meta_train.main([*ARGS, f"--workdir={tmp_path / name}", "--meta_steps=10"]) == 0
    command = capsys.readouterr().out.split("python -m launch.meta_test ")[1].splitlines()[0]
    assert shlex.split(command) == [f"--workdir={tmp_path / name}"]  # what it says can be pasted
    assert (tmp_path / name / "learned_loss").is_dir()


NO_TEST = [
    ([], "--workdir is missing"),
    (["--workdir="], "--workdir is missing"),
    (["--workdir={run}", "--workdir="], "--workdir is missing"),
    (["--workdir={new}"], "does not exist"),
    (["--workdir={file}"], "is a file"),
    (["--workdir={empty}"], "holds no config.json"),
    (["--workdir={run}", "--tasks=0"], "--tasks must be at least 1, got 0"),
    (["--workdir={run}", "--steps=-3"], "--steps must be at least 1, got -3"),
    (["--workdir={run}", "--steps=many"], "--steps must be a whole number, got 'many'"),
    (["--workdir={run}", "--task=3"], "unknown flag '--task'; did you mean '--tasks'?"),
    (["--workdir={run}", "--config.inner_lr=3"], "--config.inner_lr"),
    (["--workdir={bare}"], "holds no checkpoint"),
]


@pytest.mark.parametrize(("arguments", "message"), NO_TEST, ids=[case[1][:40] for case in NO_TEST])
def test_misuse_of_meta_test_is_one_line_and_overwrites_nothing(arguments, message, tmp_path, finished, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((finished / "config.json").read_bytes())
    paths = {"run": finished} | {name: tmp_path / name for name in ("new", "file", "empty", "bare")}
    before = snapshot(tmp_path), snapshot(finished)
    assert meta_test.main(["meta_test", *(argument.format(**paths) for argument in arguments)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert (snapshot(tmp_path), snapshot(finished)) == before


def test_an_unknown_flag_ends_the_process_with_code_2_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "launch.meta_test", f"--workdir={tmp_path / 'run'}", "--wrokdir=x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown flag '--wrokdir'; did you mean '--workdir'?")
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


def test_list_has_a_line_for_each_experiment(capsys, monkeypatch):
    monkeypatch.setattr(experiments, "modules", lambda: {"line": "tests.launch.line"})
    assert meta_train.main(["meta_train", "--list"]) == 0
    assert capsys.readouterr().out.split() == ["line", "a", "line", "through", "points", "with", "outliers", "(1", "s)"]


@pytest.mark.parametrize("entry", [meta_train, meta_test])
def test_help_names_every_flag(entry, capsys):
    assert meta_train.main(["program", "--help", "--experiment=line"]) == 0
    assert "outliers" in capsys.readouterr().out
    assert entry.main(["program", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--workdir: " in said
    assert "--seed: " in said


def test_config_fields_and_seed_reach_config_json_and_a_full_disk_is_one_line_and_exit_code_1(tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device", "metrics.csv")

    monkeypatch.setattr(metrics_log.Log, "write", full)
    flags = ["--seed=3", "--meta_steps=5", "--config.inner_optimizer=adam", "--noconfig.extra", "--config.hidden=(3,2)"]
    assert meta_train.main([*ARGS, f"--workdir={tmp_path / 'run'}", *flags]) == 1
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'metrics.csv'\n"
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (written["experiment"], written["seed"], written["meta_steps"]) == ("line", 3, 5)
    config = written["config"]
    assert (config["inner_optimizer"], config["inner_lr"], config["extra"], config["hidden"]) == ("adam", 0.05, False, [3, 2])
    assert None not in config.values()
    assert set(written["versions"]) == {"jax", "jaxlib", "ml3_jax"}


def test_a_dry_run_says_what_the_run_would_cost_and_writes_nothing(tmp_path, capsys):
    assert meta_train.main([*ARGS, f"--workdir={tmp_path / 'run'}", "--dry_run"]) == 0
    said = capsys.readouterr().out
    for pattern in (
        r"^devices: \d+ of ",
        r"^compile time: \d+\.\d s$",
        r"^one meta-step: [\d.e+-]+ ms \(mean of 5\)$",
        r"^20 meta-steps: about [\d.]+ m?s$",
        r"^peak memory: [\d,]+ MB of the process$",
    ):
        assert re.search(pattern, said, re.MULTILINE), (pattern, said)
    assert not (tmp_path / "run").exists()
    assert meta_train.main([*ARGS, "--dry_run"]) == 0  # without a folder
    assert meta_train.main([*ARGS, "--dry_run", "--config.broken=nan"]) == 2


def test_durations_in_words():
    words = {0.0123: "12.3 ms", 5.0: "5 s", 75.0: "1 min 15 s", 7500.0: "2 h 5 min"}
    assert {seconds: dry_run._duration(seconds) for seconds in words} == words


def test_threads_that_cannot_write_print_nothing_and_other_errors_stay_loud():
    program = """
import threading
from launch.runs import cli
cli._keep_threads_quiet()
for error in (OSError(28, "disk is full"), RuntimeError("Event loop is closed"), ValueError("a defect")):
    def fail(error=error):
        raise error
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
raise OSError("of the main thread")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "disk is full" not in done.stderr
    assert "Event loop" not in done.stderr
    assert "ValueError: a defect" in done.stderr
    assert "OSError: of the main thread" in done.stderr
