"""Saved losses and checkpoints: round trips, damage of every kind, and a resumed meta-training."""

import contextlib
import json
import pathlib
import pickle
import re
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from flax.core import FrozenDict

import ml3_jax
from ml3_jax import checkpoint, checkpoint_record
from tests.ml3_jax import toys

LOSS = ml3_jax.losses.mlp(hidden=(16,))
LOSS_PARAMS = LOSS.init(toys.KEY, 3)


class Formula(NamedTuple):
    """Parameters in a container that is not a dictionary, list or tuple."""

    weight: jax.Array
    power: jax.Array


def formula_loss() -> ml3_jax.LearnedLoss:
    return ml3_jax.LearnedLoss(
        init=lambda key, features: Formula(jnp.ones(2), jnp.asarray(2.0)),
        apply=lambda phi, features: jnp.mean(jnp.abs(features) ** phi.power @ phi.weight),
    )


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def damage_arrays(damage: Callable[[pathlib.Path], object], folder: pathlib.Path) -> None:
    """Damages every file of array data: Orbax leaves some without a reference."""
    files = [p for p in folder.rglob("d/*") if p.is_file()]
    assert files
    for path in files:
        damage(path)


def flip(path: pathlib.Path) -> None:
    """Inverts one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {"flipped": flip, "truncated": truncate, "deleted": pathlib.Path.unlink}


@pytest.fixture(scope="module")
def saved_loss(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a saved loss, to copy."""
    path = tmp_path_factory.mktemp("saved") / "loss"
    ml3_jax.save(path, LOSS, LOSS_PARAMS)
    return path


@pytest.fixture
def loss_folder(tmp_path: pathlib.Path, saved_loss: pathlib.Path) -> pathlib.Path:
    """A copy of a saved loss, to damage."""
    return pathlib.Path(shutil.copytree(saved_loss, tmp_path / "loss"))


@pytest.fixture(scope="module")
def saved_steps(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with the checkpoints of steps 1 and 2, to copy."""
    return saved(tmp_path_factory.mktemp("saved") / "steps", 1, 2)


@pytest.fixture
def steps_folder(tmp_path: pathlib.Path, saved_steps: pathlib.Path) -> pathlib.Path:
    """A copy of the checkpoints of steps 1 and 2, to damage."""
    return pathlib.Path(shutil.copytree(saved_steps, tmp_path / "steps"))


# --- one trained loss


def test_a_restored_loss_gives_the_same_bits(tmp_path: pathlib.Path):
    ml3_jax.save(tmp_path / "deep" / "loss", LOSS, LOSS_PARAMS, metadata={"experiment": "points"})
    again, loss_params = ml3_jax.restore(tmp_path / "deep" / "loss")
    toys.assert_same(loss_params, LOSS_PARAMS)
    features = jax.random.normal(toys.KEY, (5, 3))
    toys.assert_same(again.apply(loss_params, features), LOSS.apply(LOSS_PARAMS, features))
    assert again.spec == LOSS.spec


def test_a_loss_built_on_another_is_restored_with_it(tmp_path: pathlib.Path):
    loss = ml3_jax.losses.per_class(ml3_jax.losses.mlp((5,), "elu", positive=False, bias=True))
    loss_params = loss.init(toys.KEY, 2)
    ml3_jax.save(str(tmp_path / "loss"), loss, loss_params)
    again, restored = ml3_jax.restore(str(tmp_path / "loss"))
    features = jax.random.normal(toys.KEY, (5, 3, 2))
    toys.assert_same(again.apply(restored, features), loss.apply(loss_params, features))
    assert again.layout == "classes"


UNREGISTERED: dict[str, Any] = {
    "bare": jnp.arange(3.0),
    "nested": {"a": [jnp.ones(2), (jnp.zeros((2, 1)), jnp.asarray(3, jnp.int32))], "b": {}},
    "bfloat16": {"w": jnp.asarray([1.5, -2.25], jnp.bfloat16)},
}


@pytest.mark.parametrize("loss_params", UNREGISTERED.values(), ids=list(UNREGISTERED))
def test_parameters_of_a_loss_without_spec_survive(tmp_path: pathlib.Path, loss_params: Any):
    with pytest.warns(UserWarning, match="has no spec, so only its parameters are saved"):
        ml3_jax.save(tmp_path / "loss", formula_loss(), loss_params)
    own = formula_loss()
    again, restored = ml3_jax.restore(tmp_path / "loss", learned_loss=own)
    assert again is own
    toys.assert_same(restored, loss_params)


TEMPLATED: dict[str, Any] = {
    "named_tuple": Formula(jnp.asarray([0.5, 2.0]), jnp.asarray(3.0)),
    "frozen_dict": FrozenDict({"params": {"w": jnp.arange(3.0)}}),
    "none_inside": {"w": jnp.arange(3.0), "absent": None},
}


@pytest.mark.parametrize("loss_params", TEMPLATED.values(), ids=list(TEMPLATED))
def test_other_containers_need_a_template_and_say_so(tmp_path: pathlib.Path, loss_params: Any):
    own = formula_loss()
    with pytest.warns(UserWarning, match="no spec"):
        ml3_jax.save(tmp_path / "loss", own, loss_params)
    with pytest.raises(ValueError, match=r"a pytree with other containers, PyTreeDef.*: give one like it, .*template"):
        ml3_jax.restore(tmp_path / "loss", learned_loss=own)
    template = jax.tree.map(jnp.zeros_like, loss_params)
    toys.assert_same(ml3_jax.restore(tmp_path / "loss", own, template)[1], loss_params)
    with pytest.raises(ValueError, match=r"template: expected the leaves of the saved structure .*missing, \['other'\] new"):
        ml3_jax.restore(tmp_path / "loss", own, {"other": jnp.zeros(())})
    with pytest.raises(ValueError, match=r"template: expected leaves of the shapes .*, got \[\(7,\)"):
        ml3_jax.restore(tmp_path / "loss", own, jax.tree.map(lambda leaf: jnp.zeros(7), loss_params))


def test_a_loss_without_spec_needs_its_functions_and_says_so(tmp_path: pathlib.Path):
    with pytest.warns(UserWarning, match=r"restore\(path, learned_loss=...\)"):
        ml3_jax.save(tmp_path / "loss", formula_loss(), jnp.ones(2))
    with pytest.raises(ValueError, match=r"has no spec: give its functions, restore\(path, learned_loss=...\)"):
        ml3_jax.restore(tmp_path / "loss")


@pytest.mark.parametrize("kind", ["file", "folder", "saved"])
def test_a_path_that_exists_is_refused_and_left_untouched(loss_folder: pathlib.Path, kind: str):
    path = {"file": loss_folder.parent / "mine", "folder": loss_folder / "about", "saved": loss_folder}[kind]
    (loss_folder.parent / "mine").write_text("mine")
    before = files_of(loss_folder.parent)
    with pytest.raises(FileExistsError, match="exists: expected a path that does not exist; choose another"):
        ml3_jax.save(path, LOSS, jax.tree.map(jnp.zeros_like, LOSS_PARAMS))
    assert files_of(loss_folder.parent) == before


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_damaged_arrays_of_a_loss_are_refused(loss_folder: pathlib.Path, damage):
    damage_arrays(damage, loss_folder)
    with pytest.raises(checkpoint.CheckpointError, match=r"loss is damaged: .*; restore another copy"):
        ml3_jax.restore(loss_folder)


def test_the_arrays_of_another_loss_are_refused(tmp_path: pathlib.Path, loss_folder: pathlib.Path):
    ml3_jax.save(tmp_path / "other", LOSS, jax.tree.map(lambda x: 2.0 * x, LOSS_PARAMS))
    shutil.rmtree(loss_folder / "state")
    shutil.copytree(tmp_path / "other" / "state", loss_folder / "state")
    with pytest.raises(checkpoint.CheckpointError, match=r"loss is damaged: .*digest differs"):
        ml3_jax.restore(loss_folder)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_record_of_a_loss_is_refused(loss_folder: pathlib.Path, damage):
    damage(next(p for p in (loss_folder / "about").iterdir() if p.is_file()))
    with pytest.raises(checkpoint.CheckpointError):
        ml3_jax.restore(loss_folder)


def test_a_changed_word_in_the_spec_is_refused(loss_folder: pathlib.Path):
    # Valid JSON and a registered loss, but with gelu for relu.
    record = next(p for p in (loss_folder / "about").iterdir() if p.is_file())
    text = record.read_text()
    assert text.count('"relu"') == 1
    record.write_text(text.replace('"relu"', '"gelu"'))
    with pytest.raises(checkpoint.CheckpointError):
        ml3_jax.restore(loss_folder)


def test_a_path_without_a_saved_loss_is_refused_with_the_reason(tmp_path: pathlib.Path, saved_steps: pathlib.Path):
    with pytest.raises(checkpoint.CheckpointError, match=r"expected a folder that ml3_jax.save wrote, found nothing"):
        ml3_jax.restore(tmp_path / "absent")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(checkpoint.CheckpointError, match=r"expected a folder that ml3_jax.save wrote, found a file"):
        ml3_jax.restore(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(checkpoint.CheckpointError, match=r"is damaged or was not written by ml3_jax.save"):
        ml3_jax.restore(tmp_path / "folder")
    with pytest.raises(checkpoint.CheckpointError, match="is no saved loss"):
        ml3_jax.restore(saved_steps / "1")


def change_record(folder: pathlib.Path, **changes: Any) -> None:
    """Changes entries in the record of a saved loss or of a step."""
    record = next(path for path in (folder / "about").iterdir() if path.is_file())
    record.write_text(json.dumps({**json.loads(record.read_text()), **changes}))


# --- the checkpoints of a meta-training


def state_like(number: float) -> dict[str, Any]:
    return {
        "w": jnp.full((300,), number),
        "key": jax.random.key(int(number)),
        "keys": jax.random.split(jax.random.key(int(number)), 3),
        "count": jnp.asarray(int(number), jnp.int32),
        "half": jnp.asarray([number], jnp.bfloat16),
        "none": None,
        "opt": optax.adam(1e-3).init(jnp.zeros(2)),
    }


def saved(folder: pathlib.Path, *steps: int, keep: int = 3) -> pathlib.Path:
    manager = checkpoint.Checkpoints(folder, keep=keep)
    for step in steps:
        manager.save(step, state_like(float(step)), {"at": step})
    manager.close()
    return folder


def latest(folder: pathlib.Path, template: Any = None) -> tuple[int, Any, dict[str, Any]] | None:
    manager = checkpoint.Checkpoints(folder, read_only=True)
    try:
        return manager.restore_latest(state_like(0.0) if template is None else template)
    finally:
        manager.close()


def test_every_kind_of_leaf_and_typed_keys_survive(saved_steps: pathlib.Path):
    found = latest(saved_steps)
    assert found is not None
    step, state, about = found
    assert (step, about) == (2, {"at": 2})
    toys.assert_same(state, state_like(2.0))
    toys.assert_same(jax.random.normal(state["key"], (2,)), jax.random.normal(jax.random.key(2), (2,)))


def test_the_newest_are_kept(tmp_path: pathlib.Path):
    manager = checkpoint.Checkpoints(saved(tmp_path / "steps", 1, 2, 3, keep=2), read_only=True)
    assert manager.steps() == [2, 3]
    manager.close()


def test_nothing_saved_is_none(tmp_path: pathlib.Path):
    (tmp_path / "steps").mkdir()
    assert latest(tmp_path / "steps") is None


def test_a_saved_step_is_not_written_again(steps_folder: pathlib.Path):
    before = files_of(steps_folder)
    manager = checkpoint.Checkpoints(steps_folder)
    manager.save(2, state_like(9.0))
    manager.close()
    assert files_of(steps_folder) == before


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
@pytest.mark.parametrize("part", ["arrays", "record"])
def test_an_older_step_replaces_a_damaged_one_and_reading_changes_nothing(steps_folder: pathlib.Path, damage, part: str):
    if part == "arrays":
        damage_arrays(damage, steps_folder / "2")
    else:
        damage(next(p for p in (steps_folder / "2" / "about").iterdir() if p.is_file()))
    before = files_of(steps_folder)
    found = latest(steps_folder)
    assert found is not None
    assert found[0] == 1
    toys.assert_same(found[1], state_like(1.0))
    assert files_of(steps_folder) == before


def test_an_older_step_replaces_one_with_the_arrays_of_another(steps_folder: pathlib.Path):
    # Orbax reads them without an error, as it reads a flipped bit in the numbers: only the digest differs.
    shutil.rmtree(steps_folder / "2" / "state")
    shutil.copytree(steps_folder / "1" / "state", steps_folder / "2" / "state")
    found = latest(steps_folder)
    assert found is not None
    assert found[0] == 1
    toys.assert_same(found[1], state_like(1.0))


def test_an_older_step_replaces_a_half_deleted_one(steps_folder: pathlib.Path):
    for path in (steps_folder / "2" / "state").rglob("*"):
        if path.is_file():
            path.unlink()
    found = latest(steps_folder)
    assert found is not None
    assert found[0] == 1


def test_when_every_step_is_damaged_each_is_named(steps_folder: pathlib.Path):
    for step in ("1", "2"):
        damage_arrays(flip, steps_folder / step)
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint in .* can be read \(step 2: .*; step 1: "):
        latest(steps_folder)


def test_a_damaged_step_is_written_again(steps_folder: pathlib.Path):
    damage_arrays(flip, steps_folder / "2")
    manager = checkpoint.Checkpoints(steps_folder)
    found = manager.restore_latest(state_like(0.0))
    assert found is not None
    assert found[0] == 1
    manager.save(2, state_like(2.0), {"at": 2})
    manager.close()
    again = latest(steps_folder)
    assert again is not None
    assert again[0] == 2
    toys.assert_same(again[1], state_like(2.0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {**s, "w": jnp.zeros(299)}, r"\['w'\] is float32 \[300\] there, and float32 \[299\] here"),
        (lambda s: {**s, "w": jnp.zeros(300, jnp.int32)}, r"\['w'\] is float32 \[300\] there, and int32 \[300\] here"),
        (lambda s: {**s, "none": jnp.zeros(())}, r"nothing missing, \['none'\] new"),
        (lambda s: {k: v for k, v in s.items() if k != "half"}, r"\['half'\] missing, nothing new"),
    ],
    ids=["shape", "dtype", "an array for None", "a leaf less"],
)
def test_a_state_of_another_structure_is_refused_with_the_leaf(saved_steps: pathlib.Path, change: Any, words: str):
    with pytest.raises(checkpoint.CheckpointError, match=f"step 2: it was saved from a state of another structure: .*{words}"):
        latest(saved_steps, change(state_like(0.0)))


def test_a_checkpoint_of_another_version_is_refused_with_both_versions(
    loss_folder: pathlib.Path, steps_folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    change_record(loss_folder, version="9.1.0", format=7)
    words = rf"was written by ml3_jax 9\.1\.0 in format 7, and ml3_jax {re.escape(checkpoint_record.VERSION)} reads format 1"
    with pytest.raises(checkpoint.CheckpointError, match=words):
        ml3_jax.restore(loss_folder)
    for step in ("1", "2"):
        change_record(steps_folder / step, version="9.1.0", format=7)
    with pytest.raises(checkpoint.CheckpointError, match=f"step 2: .*{words}.*step 1: "):
        latest(steps_folder)
    monkeypatch.setattr(checkpoint_record, "VERSION", "9.1.0")
    newer = saved(steps_folder.parent / "newer", 1)
    monkeypatch.undo()
    assert latest(newer) is not None  # the same format
    with pytest.raises(checkpoint.CheckpointError, match=r"of another structure by ml3_jax 9\.1\.0, and this is "):
        latest(newer, {**state_like(0.0), "w": jnp.zeros(3)})


class Activated(struct.PyTreeNode):
    """Parameters with a function that is no leaf; the text of a function has its address."""

    w: jax.Array
    activation: Any = struct.field(pytree_node=False, default=jnp.tanh)


def test_functions_in_a_structure_are_not_compared(tmp_path: pathlib.Path):
    own = formula_loss()
    with pytest.warns(UserWarning, match="no spec"):
        ml3_jax.save(tmp_path / "loss", own, Activated(jnp.arange(2.0), lambda x: x))
    template = Activated(jnp.zeros(2), lambda x: 2.0 * x)
    restored = ml3_jax.restore(tmp_path / "loss", own, template)[1]
    assert restored.activation is template.activation
    toys.assert_same(restored.w, jnp.arange(2.0))
    assert " at 0x" not in json.dumps(checkpoint._read_record(tmp_path / "loss"))


def test_numbers_of_64_bits_are_refused_by_a_process_of_32(tmp_path: pathlib.Path):
    with jax.enable_x64(True):
        ml3_jax.save(tmp_path / "loss", LOSS, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), LOSS_PARAMS))
        toys.assert_close(
            ml3_jax.restore(tmp_path / "loss")[1], jax.tree.map(lambda leaf: leaf.astype(jnp.float64), LOSS_PARAMS)
        )
    with pytest.raises(
        checkpoint.CheckpointError, match=r"loss holds float64, and this process has 32 bits: set JAX_ENABLE_X64=1"
    ):
        ml3_jax.restore(tmp_path / "loss")


def test_metadata_may_hold_numbers_of_numpy_and_jax(tmp_path: pathlib.Path):
    metadata = {
        "error": np.float32(0.5),
        "steps": np.int64(3),
        "curve": np.arange(2),
        "rate": jnp.float32(0.25),
        "pair": (1, 2),
    }
    ml3_jax.save(tmp_path / "loss", LOSS, LOSS_PARAMS, metadata)
    expected = {"error": 0.5, "steps": 3, "curve": [0, 1], "rate": 0.25, "pair": [1, 2]}
    assert checkpoint._read_record(tmp_path / "loss")["metadata"] == expected
    ml3_jax.restore(tmp_path / "loss")
    with pytest.raises(ValueError, match=r"expected text, numbers, lists and dictionaries, as JSON has them, got .* a set"):
        ml3_jax.save(tmp_path / "other", LOSS, LOSS_PARAMS, {"wrong": {1, 2}})
    assert not (tmp_path / "other").exists()


def test_a_size_beyond_the_memory_is_refused_before_anything_is_allocated(loss_folder: pathlib.Path):
    record = next(path for path in (loss_folder / "about").iterdir() if path.is_file())
    content = json.loads(record.read_text())
    content["leaves"][0]["shape"] = [10**9, 10**6]
    record.write_text(json.dumps(content))
    with pytest.raises(checkpoint.CheckpointError, match=r"loss says that it holds 4e\+15 bytes, and this machine has"):
        ml3_jax.restore(loss_folder)


def test_a_resumed_meta_training_is_the_uninterrupted_one(tmp_path: pathlib.Path):
    def learner() -> ml3_jax.MetaLearner:
        return toys.learner(toys.stream(), inner_steps=2, unroll=1, meta_optimizer=optax.adam(1e-2))

    meta = learner()
    half, _ = meta.run(meta.init(toys.KEY), 2)
    uninterrupted, metrics = meta.run(half, 2)
    manager = checkpoint.Checkpoints(tmp_path / "steps")
    manager.save(2, half)
    manager.close()

    meta = learner()  # as another process would build it
    found = latest(tmp_path / "steps", meta.init(jax.random.key(0)))
    assert found is not None
    toys.assert_same(found[1], half)
    resumed, again = meta.run(found[1], 2)
    toys.assert_same(resumed, uninterrupted)
    toys.assert_same(again, metrics)


def test_nothing_is_pickled(saved_loss: pathlib.Path):
    files = files_of(saved_loss)
    assert files
    for name, data in files.items():
        assert not name.endswith((".pkl", ".pickle")), name
        assert not data.startswith(b"\x80\x04"), name


# --- checkpoints of strangers


class Payload:
    """A pickle of it writes a file when it is read."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self) -> Any:
        return pathlib.Path.touch, (self.path,)


def test_no_file_of_a_saved_loss_runs_code(tmp_path: pathlib.Path, loss_folder: pathlib.Path):
    evil, marker = pickle.dumps(Payload(tmp_path / "ran")), tmp_path / "ran"
    pickle.loads(evil)
    assert marker.exists()  # so the payload works
    marker.unlink()
    files = [path for path in sorted(loss_folder.rglob("*")) if path.is_file()]
    for path in files:
        copy = shutil.copytree(loss_folder, tmp_path / "copy")
        (copy / path.relative_to(loss_folder)).write_bytes(evil)
        with contextlib.suppress(checkpoint.CheckpointError):  # Orbax reads its own metadata only where it needs them
            ml3_jax.restore(copy)
        assert not marker.exists(), path
        shutil.rmtree(copy)


def test_a_spec_names_registered_losses_alone(loss_folder: pathlib.Path):
    record = next(path for path in (loss_folder / "about").iterdir() if path.is_file())
    content = json.loads(record.read_text())
    content["spec"] = {"name": "os.system", "arguments": {"command": "true"}}
    with pytest.raises(ValueError, match=r"learned loss: expected one of .*, got 'os\.system'"):
        ml3_jax.losses.from_spec(content["spec"])
    record.write_text(json.dumps(content))
    with pytest.raises(checkpoint.CheckpointError, match="is damaged"):  # the digest covers the spec
        ml3_jax.restore(loss_folder)


@pytest.mark.parametrize(
    "change", [{"leaves": None}, {"leaves": 3}, {"leaves": [{"dtype": "foo", "shape": [2]}]}, {"leaves": [{"shape": "x"}]}]
)
def test_a_record_that_makes_no_sense_is_called_damaged(loss_folder: pathlib.Path, change: Any):
    change_record(loss_folder, **change)
    with pytest.raises(checkpoint.CheckpointError, match="loss is damaged"):
        ml3_jax.restore(loss_folder)


def test_a_link_out_of_the_folder_is_refused(tmp_path: pathlib.Path, loss_folder: pathlib.Path, steps_folder: pathlib.Path):
    for folder in (loss_folder, steps_folder / "2"):
        path = next(path for path in folder.rglob("d/*") if path.is_file())
        outside = tmp_path / f"{folder.name}_outside"
        path.rename(outside)
        path.symlink_to(outside)
    with pytest.raises(checkpoint.CheckpointError, match=r"is a link to .*_outside, outside of the folder"):
        ml3_jax.restore(loss_folder)
    found = latest(steps_folder)
    assert found is not None
    assert found[0] == 1  # the older one is used


PICKLES = r"\b(pickle|cloudpickle|dill|joblib|marshal|shelve)\b|allow_pickle=True|yaml\.load"
RUNS_CODE = re.compile(PICKLES + r"|(?<![\w.])(eval|exec|compile)\(")


def test_the_sources_have_no_way_to_run_code_of_a_file():
    root = pathlib.Path(ml3_jax.__file__).parents[1]
    sources = [path for room in ("ml3_jax", "launch", "envs") for path in (root / room).rglob("*.py")]
    assert len(sources) > 50
    for path in sources:
        assert not RUNS_CODE.search(path.read_text()), path
