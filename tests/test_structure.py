"""The rules of the house that the syntax tree can show: who imports whom, docstrings, sizes, and what is never written."""

import ast
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ROOMS = ("ml3_jax", "envs", "launch")
# What each room may import beside the standard library and itself.
ALLOWED = {
    "ml3_jax": {"jax", "flax", "optax", "chex", "numpy"},
    "envs": {"jax", "brax", "numpy", "flax", "mujoco"},  # mujoco: to read models, in one function
}
FORBIDDEN = {"launch": {"tests", "benchmarks"}}
MODULE_LINES = 400


def modules(*rooms: str) -> list[pathlib.Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def name_of(path: pathlib.Path) -> str:
    """The dotted name of a module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tree_of(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of everything that is imported anywhere below a node; `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def roots(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imports(tree)}


def in_rooms(*rooms: str):
    paths = modules(*rooms)
    return pytest.mark.parametrize("path", paths, ids=[str(p.relative_to(ROOT)) for p in paths])


def test_the_rooms_are_where_the_design_says():
    assert modules("ml3_jax")
    assert {path.stem for path in (ROOT / "ml3_jax").glob("*.py")} >= {"types", "inner", "outer", "adaptation", "checkpoint"}


@in_rooms("ml3_jax", "envs")
def test_imports_go_down_only(path: pathlib.Path):
    room = path.relative_to(ROOT).parts[0]
    allowed = ALLOWED[room] | {room} | set(sys.stdlib_module_names)
    if name_of(path) == "ml3_jax.checkpoint":
        allowed |= {"orbax"}
    assert roots(tree_of(path)) <= allowed


@in_rooms("launch")
def test_launch_knows_no_tests_and_no_benchmarks(path: pathlib.Path):
    assert not roots(tree_of(path)) & FORBIDDEN["launch"]


@in_rooms(*ROOMS)
def test_no_star_imports(path: pathlib.Path):
    stars = [n for n in ast.walk(tree_of(path)) if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"]
    assert not stars


def imported_modules(path: pathlib.Path, known: set[str]) -> set[str]:
    """The modules of the library that one of them imports when it is imported, itself and its packages aside."""
    tree = tree_of(path)
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in inside:
            wrapped = ast.Module([node], [])
            names |= imports(wrapped) & known
    # `from ml3_jax import losses` names the package too; that is no use of what the package's __init__ gathers.
    return names - {"ml3_jax", "ml3_jax.problems", name_of(path)}


def test_no_cycles_inside_the_library():
    paths = {name_of(path): path for path in modules("ml3_jax")}
    uses = {name: imported_modules(path, set(paths)) for name, path in paths.items()}
    assert uses["ml3_jax.outer"] >= {"ml3_jax.inner", "ml3_jax.types"}
    done: set[str] = set()
    while len(done) < len(uses):
        ready = {name for name, needs in uses.items() if name not in done and needs <= done}
        assert ready, f"a cycle among {sorted(set(uses) - done)}"
        done |= ready


def launch_rooms() -> dict[str, set[str]]:
    """{room of launch: rooms that it imports}: a folder is one room, and so is each file beside the folders.

    Imports inside functions count, and so do the names that importlib gets as text.
    """
    known = {name_of(path): room_of(path) for path in modules("launch")}
    uses: dict[str, set[str]] = {room: set() for room in known.values()}
    for path in modules("launch"):
        tree = tree_of(path)
        text = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        uses[room_of(path)] |= {known[name] for name in (imports(tree) | text) & set(known)}
    return {room: needs - {room, "launch"} for room, needs in uses.items()}


def room_of(path: pathlib.Path) -> str:
    """The first two parts of a module's name, e.g. launch.runs."""
    return ".".join(name_of(path).split(".")[:2])


def test_imports_inside_launch_run_one_way_over_at_most_six_floors():
    uses, floors = launch_rooms(), []
    assert uses["launch.meta_train"] >= {"launch.experiments", "launch.runs"}
    done: set[str] = set()
    while len(done) < len(uses):
        floor = {room for room, needs in uses.items() if room not in done and needs <= done}
        assert floor, f"a cycle among {sorted(set(uses) - done)}"
        floors.append(floor)
        done |= floor
    assert len(floors) <= 6, floors


@pytest.mark.parametrize("room", ["runs", "evaluation", "figures", "runtime"])
def test_machinery_of_launch_knows_no_experiment(room: str):
    assert "launch.experiments" not in launch_rooms()[f"launch.{room}"]


def test_launch_and_the_library_stay_small():
    lines = {room: sum(len(path.read_text().splitlines()) for path in modules(room)) for room in ROOMS}
    assert lines["launch"] <= 8400
    assert sum(lines.values()) <= 18_600


@in_rooms(*ROOMS)
def test_a_module_says_what_it_is_and_holds_one_thing(path: pathlib.Path):
    assert ast.get_docstring(tree_of(path)), "a module docstring"
    assert len(path.read_text().splitlines()) <= MODULE_LINES


def public_definitions(tree: ast.Module) -> list[ast.FunctionDef | ast.ClassDef]:
    """Public functions and classes of a module, and the public methods of those classes."""
    found: list[ast.FunctionDef | ast.ClassDef] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found.append(node)
            if isinstance(node, ast.ClassDef):
                found += [m for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")]
    return found


@in_rooms("ml3_jax")
def test_every_public_function_and_class_has_a_docstring(path: pathlib.Path):
    bare = [node.name for node in public_definitions(tree_of(path)) if not ast.get_docstring(node)]
    assert not bare


@in_rooms(*ROOMS)
def test_no_check_is_switched_off(path: pathlib.Path):
    switch = re.compile(r"#\s*(noqa|type:\s*ignore|pyright:\s*ignore|pylint:\s*disable)")
    assert [line for line in path.read_text().splitlines() if switch.search(line)] == []


def is_comment(line: str) -> bool:
    return line.strip().startswith("#")


@in_rooms(*ROOMS)
def test_every_stop_gradient_says_what_it_cuts(path: pathlib.Path):
    # The comment stands on the line of the call, or just above the run of statements whose lines all cut something.
    text = path.read_text()
    lines = text.splitlines()
    cuts = {
        node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute | ast.Name)
        and (node.attr if isinstance(node, ast.Attribute) else node.id) == "stop_gradient"
    }
    for number in sorted(cuts):
        first = number
        while first - 1 in cuts:
            first -= 1
        said = is_comment(lines[first - 2]) if first > 1 else False
        assert "#" in lines[number - 1] or said, f"line {number}: a stop_gradient without a comment"


def test_the_brax_and_orbax_rules_are_checked_and_not_only_written():
    # What the rules above would say to a module that breaks them.
    assert "brax" not in ALLOWED["ml3_jax"]
    assert "orbax" not in ALLOWED["ml3_jax"]
    assert "ml3_jax" not in ALLOWED["envs"]
    assert roots(ast.parse("from brax import envs\ndef f():\n    import orbax.checkpoint as ocp")) == {"brax", "orbax"}
    assert imports(ast.parse("from ml3_jax import losses")) == {"ml3_jax", "ml3_jax.losses"}
