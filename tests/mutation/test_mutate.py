"""Mutants replace one expression, and a seed always draws the same ones."""

import ast
import textwrap

import pytest

from tests.mutation import mutants, mutate

SOURCE = textwrap.dedent('''
    """The 1 of a docstring stays."""


    @cached(8)
    def f(x: Tuple[3], n=0) -> Tuple[2]:
        if not x < 2:
            raise ValueError("x " * 3, x - 1)
        é = ("é", jnp.max(x[1:]))[1] * (n + x)
        assert n == 0, n - 1
        return -jax.tree.map(stop_gradient, é) if x and n else lax.stop_gradient(é)
''')
EXPECTED = {
    ("def f(x: Tuple[3], n=0) -> Tuple[2]:", "0", "1"),
    ("if not x < 2:", "not x < 2", "x < 2"),
    ("if not x < 2:", "x < 2", "x > 2"),
    ("if not x < 2:", "2", "3"),
    ("é = (\"é\", jnp.max(x[1:]))[1] * (n + x)", "('é', jnp.max(x[1:]))[1] * (n + x)", "('é', jnp.max(x[1:]))[1] / (n + x)"),
    ("é = (\"é\", jnp.max(x[1:]))[1] * (n + x)", "('é', jnp.max(x[1:]))[1] * (n + x)", "('é', jnp.max(x[1:]))[1]"),
    ("é = (\"é\", jnp.max(x[1:]))[1] * (n + x)", "('é', jnp.max(x[1:]))[1] * (n + x)", "n + x"),
    ("é = (\"é\", jnp.max(x[1:]))[1] * (n + x)", "jnp.max", "jnp.min"),
    ("é = (\"é\", jnp.max(x[1:]))[1] * (n + x)", "1", "2"),
    ("é = (\"é\", jnp.max(x[1:]))[1] * (n + x)", "n + x", "n - x"),
    ("return -jax.tree.map(stop_gradient, é) if x and n else lax.stop_gradient(é)", "-jax.tree.map(stop_gradient, é)",
     "jax.tree.map(stop_gradient, é)"),
    ("return -jax.tree.map(stop_gradient, é) if x and n else lax.stop_gradient(é)", "jax.tree.map(stop_gradient, é)", "é"),
    ("return -jax.tree.map(stop_gradient, é) if x and n else lax.stop_gradient(é)", "x and n", "x or n"),
    ("return -jax.tree.map(stop_gradient, é) if x and n else lax.stop_gradient(é)", "lax.stop_gradient(é)", "é"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return mutate.sources_of(mutate.ROOT)


def test_every_kind_of_fault_is_found_and_messages_hints_and_decorators_stay():
    assert {(one.text, one.before, one.after) for one in mutants.mutants_of(SOURCE, "f.py")} == EXPECTED


def test_a_mutant_changes_its_own_expression_alone():
    before = ast.dump(ast.parse(SOURCE))
    for mutant in mutants.mutants_of(SOURCE, "f.py"):
        broken = mutants.apply(SOURCE, mutant)
        old, new = (ast.dump(ast.parse(code, mode="eval").body) for code in (mutant.before, mutant.after))
        after = ast.dump(ast.parse(broken))
        assert after != before
        assert after in {before[:at] + new + before[at + len(old) :] for at in range(len(before)) if before.startswith(old, at)}


def test_a_seed_draws_the_same_mutants_of_different_modules(sources):
    chosen, _ = mutants.choose(sources, 20, seed=0)
    assert mutants.choose(sources, 20, seed=0)[0] == chosen
    assert mutants.choose(sources, 20, seed=1)[0] != chosen
    assert len({mutant.path for mutant in chosen}) == 20
    assert len({mutant.kind for mutant in chosen}) >= 4
    for mutant in chosen:
        ast.parse(mutants.apply(sources[mutant.path], mutant))


def test_an_equivalent_mutant_is_replaced_with_its_reason():
    (first,), _ = mutants.choose({"f.py": SOURCE}, 1, seed=0)
    known = mutants.Equivalent(first.path, first.text, first.after, "no one can see it")
    (other,), replaced = mutants.choose({"f.py": SOURCE}, 1, seed=0, equivalent=(known,))
    assert other != first
    assert replaced == [(first, "no one can see it")]


def test_too_many_mutants_are_refused():
    with pytest.raises(ValueError, match=f"expected 99 mutants, found {len(mutants.mutants_of(SOURCE, 'f.py'))}"):
        mutants.choose({"f.py": SOURCE}, 99, seed=0)


def test_every_equivalent_mutant_is_one_of_the_library(sources):
    known = {(one.path, one.text, one.after) for path, text in sources.items() for one in mutants.mutants_of(text, path)}
    assert {(one.path, one.text, one.after) for one in mutate.EQUIVALENT} <= known


def test_the_fault_is_gone_after_the_block(tmp_path):
    (tmp_path / "f.py").write_text(SOURCE)
    mutant = mutants.mutants_of(SOURCE, "f.py")[0]
    with mutate.broken(tmp_path, mutant):
        assert (tmp_path / "f.py").read_text() == mutants.apply(SOURCE, mutant)
    assert (tmp_path / "f.py").read_text() == SOURCE


def test_the_tests_that_are_named_after_a_module_run_first(tmp_path):
    for name in ("test_inner.py", "test_losses.py", "problems/test_shaped.py"):
        (tmp_path / "tests" / "ml3_jax" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests" / "ml3_jax" / name).touch()
    inner, losses, shaped = (
        "tests/ml3_jax/test_inner.py",
        "tests/ml3_jax/test_losses.py",
        "tests/ml3_jax/problems/test_shaped.py",
    )
    assert mutate.commands_for(tmp_path, "ml3_jax/inner.py") == [[inner], [losses]]
    assert mutate.commands_for(tmp_path, "ml3_jax/losses/forms.py") == [[losses], [inner]]
    assert mutate.commands_for(tmp_path, "ml3_jax/problems/shaped.py") == [[shaped]]


def test_the_same_line_is_found_in_another_tree(tmp_path):
    (tmp_path / "ml3_jax").mkdir()
    (tmp_path / "ml3_jax" / "moved.py").write_text("\n\n" + SOURCE)
    mutant = mutants.mutants_of(SOURCE, "ml3_jax/f.py")[-1]
    found = mutants.same_in(tmp_path, mutant)
    assert found is not None
    assert (found.path, found.line) == ("ml3_jax/moved.py", mutant.line + 2)
    assert mutants.same_in(tmp_path, mutant._replace(text="other")) is None
