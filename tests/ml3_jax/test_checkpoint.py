"""Saved losses and checkpoints: round trips, damage of every kind, and a resumed meta-training."""

import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

import ml3_jax
from ml3_jax import checkpoint
from tests.ml3_jax import toys

LOSS = ml3_jax.losses.mlp(hidden=(16,))
LOSS_PARAMS = LOSS.init(toys.KEY, 3)


class Formula(NamedTuple):
    """Parameters of a loss of one's own."""

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
    """Damages every file of array data: Orbax leaves some behind that nothing refers to."""
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


OWN: dict[str, Any] = {
    "bare": jnp.arange(3.0),
    "nested": {"a": [jnp.ones(2), (jnp.zeros((2, 1)), jnp.asarray(3, jnp.int32))], "b": {}},
    "bfloat16": {"w": jnp.asarray([1.5, -2.25], jnp.bfloat16)},
}


@pytest.mark.parametrize("loss_params", OWN.values(), ids=list(OWN))
def test_parameters_of_ones_own_survive(tmp_path: pathlib.Path, loss_params: Any):
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
    with pytest.raises(ValueError, match=r"a pytree of their own kind, PyTreeDef.*: give one like it, .*template"):
        ml3_jax.restore(tmp_path / "loss", learned_loss=own)
    template = jax.tree.map(jnp.zeros_like, loss_params)
    toys.assert_same(ml3_jax.restore(tmp_path / "loss", own, template)[1], loss_params)
    with pytest.raises(ValueError, match=r"template: expected the structure PyTreeDef.*, got PyTreeDef"):
        ml3_jax.restore(tmp_path / "loss", own, {"other": jnp.zeros(())})


def test_a_loss_without_spec_needs_its_functions_and_says_so(tmp_path: pathlib.Path):
    with pytest.warns(UserWarning, match=r"restore\(path, learned_loss=...\)"):
        ml3_jax.save(tmp_path / "loss", formula_loss(), jnp.ones(2))
    with pytest.raises(ValueError, match=r"has no spec: give its functions, restore\(path, learned_loss=...\)"):
        ml3_jax.restore(tmp_path / "loss")


@pytest.mark.parametrize("kind", ["file", "folder", "saved"])
def test_what_is_there_already_is_refused_and_left_untouched(tmp_path: pathlib.Path, kind: str):
    path = tmp_path / "loss"
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
        (path / "mine.txt").write_text("mine")
    else:
        ml3_jax.save(path, LOSS, LOSS_PARAMS)
    before = files_of(tmp_path)
    with pytest.raises(FileExistsError, match="exists: expected a path where nothing is yet; choose another"):
        ml3_jax.save(path, LOSS, jax.tree.map(jnp.zeros_like, LOSS_PARAMS))
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_loss_is_refused(tmp_path: pathlib.Path, damage):
    path = tmp_path / "loss"
    ml3_jax.save(path, LOSS, LOSS_PARAMS)
    damage_arrays(damage, path)
    with pytest.raises(checkpoint.CheckpointError, match=r"loss is damaged: .*; restore another copy"):
        ml3_jax.restore(path)


def test_a_loss_whose_arrays_are_another_ones_is_refused(tmp_path: pathlib.Path):
    for name, scale in (("one", 1.0), ("other", 2.0)):
        ml3_jax.save(tmp_path / name, LOSS, jax.tree.map(lambda x, s=scale: s * x, LOSS_PARAMS))
    shutil.rmtree(tmp_path / "one" / "state")
    shutil.copytree(tmp_path / "other" / "state", tmp_path / "one" / "state")
    with pytest.raises(checkpoint.CheckpointError, match=r"one is damaged: .*digest differs"):
        ml3_jax.restore(tmp_path / "one")


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_record_of_a_loss_is_refused(tmp_path: pathlib.Path, damage):
    path = tmp_path / "loss"
    ml3_jax.save(path, LOSS, LOSS_PARAMS)
    damage(next(p for p in (path / "about").iterdir() if p.is_file()))
    with pytest.raises(checkpoint.CheckpointError):
        ml3_jax.restore(path)


def test_a_changed_word_in_the_spec_is_refused(tmp_path: pathlib.Path):
    # Still valid JSON, still a registered loss, but not the one that was saved: gelu for relu.
    path = tmp_path / "loss"
    ml3_jax.save(path, LOSS, LOSS_PARAMS)
    record = next(p for p in (path / "about").iterdir() if p.is_file())
    text = record.read_text()
    assert text.count('"relu"') == 1
    record.write_text(text.replace('"relu"', '"gelu"'))
    with pytest.raises(checkpoint.CheckpointError):
        ml3_jax.restore(path)


def test_what_is_no_saved_loss_is_refused_with_what_was_found(tmp_path: pathlib.Path):
    with pytest.raises(checkpoint.CheckpointError, match=r"expected a folder that ml3_jax.save wrote, found nothing"):
        ml3_jax.restore(tmp_path / "absent")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(checkpoint.CheckpointError, match=r"expected a folder that ml3_jax.save wrote, found a file"):
        ml3_jax.restore(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(checkpoint.CheckpointError, match=r"is damaged or was not written by ml3_jax.save"):
        ml3_jax.restore(tmp_path / "folder")
    manager = checkpoint.Checkpoints(tmp_path / "steps")
    manager.save(1, LOSS_PARAMS)
    manager.close()
    with pytest.raises(checkpoint.CheckpointError, match="is no saved loss"):
        ml3_jax.restore(tmp_path / "steps" / "1")


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


def test_every_kind_of_leaf_and_typed_keys_survive(tmp_path: pathlib.Path):
    found = latest(saved(tmp_path / "steps", 1, 5))
    assert found is not None
    step, state, about = found
    assert (step, about) == (5, {"at": 5})
    toys.assert_same(state, state_like(5.0))
    toys.assert_same(jax.random.normal(state["key"], (2,)), jax.random.normal(jax.random.key(5), (2,)))


def test_the_newest_are_kept(tmp_path: pathlib.Path):
    manager = checkpoint.Checkpoints(saved(tmp_path / "steps", 1, 2, 3, 4, keep=2), read_only=True)
    assert manager.steps() == [3, 4]
    manager.close()


def test_nothing_saved_is_none(tmp_path: pathlib.Path):
    (tmp_path / "steps").mkdir()
    assert latest(tmp_path / "steps") is None


def test_a_step_that_is_there_is_left_as_it_is(tmp_path: pathlib.Path):
    folder = saved(tmp_path / "steps", 1, 2)
    before = files_of(folder)
    manager = checkpoint.Checkpoints(folder)
    manager.save(2, state_like(9.0))
    manager.close()
    assert files_of(folder) == before


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
@pytest.mark.parametrize("part", ["arrays", "record"])
def test_a_damaged_step_is_walked_over_to_an_older_one(tmp_path: pathlib.Path, damage, part: str):
    folder = saved(tmp_path / "steps", 1, 2)
    if part == "arrays":
        damage_arrays(damage, folder / "2")
    else:
        damage(next(p for p in (folder / "2" / "about").iterdir() if p.is_file()))
    found = latest(folder)
    assert found is not None
    assert found[0] == 1
    toys.assert_same(found[1], state_like(1.0))


def test_arrays_that_read_well_but_are_not_those_saved_are_walked_over(tmp_path: pathlib.Path):
    # What a flipped bit in the numbers themselves leaves: Orbax reads it without a complaint.
    folder = saved(tmp_path / "steps", 1, 2, 3)
    shutil.rmtree(folder / "3" / "state")
    shutil.copytree(folder / "2" / "state", folder / "3" / "state")
    found = latest(folder)
    assert found is not None
    assert found[0] == 2
    toys.assert_same(found[1], state_like(2.0))


def test_a_half_deleted_step_is_walked_over(tmp_path: pathlib.Path):
    folder = saved(tmp_path / "steps", 1, 2)
    for path in (folder / "2" / "state").rglob("*"):
        if path.is_file():
            path.unlink()
    found = latest(folder)
    assert found is not None
    assert found[0] == 1


def test_when_every_step_is_damaged_each_is_named(tmp_path: pathlib.Path):
    folder = saved(tmp_path / "steps", 1, 2)
    for step in ("1", "2"):
        damage_arrays(flip, folder / step)
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint in .* can be read \(step 2: .*; step 1: "):
        latest(folder)


def test_a_damaged_step_that_was_walked_over_is_written_anew(tmp_path: pathlib.Path):
    folder = saved(tmp_path / "steps", 1, 2)
    damage_arrays(flip, folder / "2")
    manager = checkpoint.Checkpoints(folder)
    found = manager.restore_latest(state_like(0.0))
    assert found is not None
    assert found[0] == 1
    manager.save(2, state_like(2.0), {"at": 2})
    manager.close()
    again = latest(folder)
    assert again is not None
    assert again[0] == 2
    toys.assert_same(again[1], state_like(2.0))


def test_reading_changes_nothing(tmp_path: pathlib.Path):
    folder = saved(tmp_path / "steps", 1, 2)
    damage_arrays(flip, folder / "2")
    before = files_of(folder)
    assert latest(folder) is not None
    assert files_of(folder) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {**s, "w": jnp.zeros(299)},
        lambda s: {**s, "w": jnp.zeros(300, jnp.int32)},
        lambda s: {**s, "none": jnp.zeros(())},
        lambda s: {k: v for k, v in s.items() if k != "half"},
    ],
    ids=["shape", "dtype", "an array for None", "a leaf less"],
)
def test_a_state_of_another_structure_is_refused(tmp_path: pathlib.Path, change):
    folder = saved(tmp_path / "steps", 1)
    with pytest.raises(checkpoint.CheckpointError, match="step 1: it was saved from a state of another structure"):
        latest(folder, change(state_like(0.0)))


@pytest.mark.parametrize("unroll", [None, 2])
def test_a_resumed_meta_training_is_the_uninterrupted_one(tmp_path: pathlib.Path, unroll: int | None):
    def learner() -> ml3_jax.MetaLearner:
        return toys.learner(toys.points(), inner_steps=4, unroll=unroll, meta_optimizer=optax.adam(1e-2))

    meta = learner()
    half, _ = meta.run(meta.init(toys.KEY), 2)
    whole, metrics = meta.run(half, 2)
    manager = checkpoint.Checkpoints(tmp_path / "steps")
    manager.save(2, half)
    manager.close()

    meta = learner()  # as another process would build it
    found = latest(tmp_path / "steps", meta.init(jax.random.key(0)))
    assert found is not None
    toys.assert_same(found[1], half)
    resumed, again = meta.run(found[1], 2)
    toys.assert_same(resumed, whole)
    toys.assert_same(again, metrics)


def test_results_are_bits_on_disk_and_not_a_pickle(tmp_path: pathlib.Path):
    ml3_jax.save(tmp_path / "loss", LOSS, LOSS_PARAMS)
    files = files_of(tmp_path / "loss")
    assert files
    for name, data in files.items():
        assert not name.endswith((".pkl", ".pickle")), name
        assert not data.startswith(b"\x80\x04"), name
    assert np.asarray(LOSS_PARAMS["params"]["Dense_0"]["kernel"]).shape == (3, 16)
