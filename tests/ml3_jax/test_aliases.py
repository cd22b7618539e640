"""Old names: accepted with a DeprecationWarning, which pytest makes an error elsewhere; old files load without one."""

import functools
import importlib
import operator
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import struct

import ml3_jax
from ml3_jax import aliases, checkpoint, checkpoint_record, losses
from tests.ml3_jax import toys

NAMES = [(module, old, new) for module, names in aliases.MODULE_NAMES.items() for old, new in names.items()]


@pytest.mark.parametrize(("module", "old", "new"), NAMES)
def test_an_old_name_of_a_module_warns_and_is_the_same_object(module: str, old: str, new: str):
    with pytest.warns(DeprecationWarning, match=f"^{module}.{old} is called {module}.{new} since 0.2; .* goes with 0.3$"):
        found = getattr(importlib.import_module(module), old)
    assert found is functools.reduce(getattr, new.split("."), importlib.import_module(module))


def test_a_name_that_never_was_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'ml3_jax' has no attribute 'nothing'"):
        operator.attrgetter("nothing")(ml3_jax)


def test_an_old_keyword_warns_and_has_the_effect_of_the_new_one():
    with pytest.warns(DeprecationWarning, match=r"make_meta_learner\(spread_ages=\) is called staggered_resets= since 0.2"):
        meta = toys.learner(toys.quadratic(), toys.scaled_square(), inner_steps=4, unroll=2, spread_ages=False)
    state = jax.jit(meta.init)(toys.KEY)
    assert state.inner_state is not None
    assert state.inner_state.end.tolist() == [4, 4, 4]


def test_an_old_field_of_a_problem_is_read_and_set_with_a_warning():
    problem = toys.stream()
    old: Any = {"collected_loss": problem.task_loss}
    with pytest.warns(DeprecationWarning, match=r"Problem\(collected_loss=\) is called reused_rollout_loss="):
        made = ml3_jax.Problem(*problem[:5], **old)
    assert made.reused_rollout_loss is problem.task_loss
    with pytest.warns(DeprecationWarning, match="collected_loss"):
        replaced = problem._replace(**{"collected_loss": problem.task_loss})
    assert replaced == problem._replace(reused_rollout_loss=problem.task_loss)
    with pytest.warns(DeprecationWarning, match=r"Problem.collected_loss is called Problem.reused_rollout_loss"):
        assert operator.attrgetter("collected_loss")(replaced) is problem.task_loss
    assert isinstance(made, tuple)


def test_an_old_field_of_a_state_is_read_and_set_with_a_warning():
    state = ml3_jax.MetaState(*[jnp.zeros(())] * 5, inner_state=None)
    with pytest.warns(DeprecationWarning, match=r"MetaState\(lives=\) is called inner_state="):
        replaced = state.replace(lives=1)
    with pytest.warns(DeprecationWarning, match=r"MetaState.lives is called MetaState.inner_state"):
        assert operator.attrgetter("lives")(replaced) == 1


def test_an_old_and_a_new_keyword_at_once_are_refused():
    with pytest.raises(TypeError, match="expected spread_ages= or staggered_resets=, got both: give staggered_resets= alone"):
        toys.learner(toys.quadratic(), spread_ages=True, staggered_resets=True)


@pytest.mark.parametrize(("old", "new"), aliases.LOSS_NAMES.items())
def test_a_loss_saved_under_an_old_name_is_restored(tmp_path: pathlib.Path, old: str, new: str):
    loss = losses.REGISTRY[new]()
    assert loss.spec is not None
    loss_params = jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda: loss.init(toys.KEY, 4 if "rmse" in new else 3)))
    ml3_jax.save(tmp_path / "loss", loss._replace(spec={**loss.spec, "name": old}), loss_params)
    restored, _ = ml3_jax.restore(tmp_path / "loss")
    assert restored.spec == loss.spec


def test_a_checkpoint_with_old_class_names_is_restored(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    class Lives(struct.PyTreeNode):
        params: Any
        opt_state: Any
        task: Any
        age: Any
        end: Any

    class MetaState(struct.PyTreeNode):
        step: Any
        loss_params: Any
        opt_state: Any
        context: Any
        key: Any
        lives: Any

    def states(outer: Any, inner: Any) -> Any:
        parts = inner({"w": jnp.arange(2.0)}, optax.sgd(0.1).init(jnp.zeros(2)), jnp.ones(2), jnp.zeros(2), jnp.ones(2))
        return outer(jnp.int32(3), jnp.arange(3.0), optax.adam(0.1).init(jnp.zeros(3)), None, toys.KEY, parts)

    current = states(ml3_jax.MetaState, ml3_jax.InnerState)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    with monkeypatch.context() as without_paths:  # as version 0.1 wrote it
        without_paths.setattr(checkpoint_record, "paths_of", lambda tree: None)
        checkpoints.save(3, states(MetaState, Lives))
    found = checkpoints.restore_latest(jax.tree.map(jnp.zeros_like, current.replace(key=None)).replace(key=toys.KEY))
    checkpoints.close()
    assert found is not None
    toys.assert_same(found[1], current)


def test_a_key_of_a_dictionary_keeps_its_name():
    text = str(jax.tree.structure({"Lives": toys.Target(jnp.ones(()), jnp.ones(()))}))
    assert aliases.current_treedef(text) == text
