"""Mutants: small faults of a Python module, such as a flipped sign. `mutate` puts them into a copy of the tree, one at a time.

A mutant replaces one expression. Error messages, warnings, type hints and decorators are left as they are.
"""

import ast
import copy
import pathlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
COMPARISONS = {
    ast.Lt: ast.Gt,
    ast.Gt: ast.Lt,
    ast.LtE: ast.GtE,
    ast.GtE: ast.LtE,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_PAIRS = (("min", "max"), ("minimum", "maximum"), ("argmin", "argmax"), ("floor", "ceil"))
NAMES = {one: other for pair in _PAIRS for one, other in (pair, pair[::-1])}


class Mutant(NamedTuple):
    """One fault."""

    path: str  # relative to the root of the tree, with forward slashes
    line: int
    text: str  # the line before the fault, stripped
    kind: str
    before: str  # the expression
    after: str
    span: tuple[int, int]  # bytes of the expression in the file


class Equivalent(NamedTuple):
    """A mutant that changes nothing that a test could see."""

    path: str
    text: str
    after: str
    reason: str


def mutants_of(source: str, path: str) -> list[Mutant]:
    """All mutants of a module, in the order of its syntax tree."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    found = []
    for node in _expressions(ast.parse(source)):
        for kind, change in _changes(node):
            assert node.end_lineno is not None
            assert node.end_col_offset is not None
            span = (starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset)
            text = lines[node.lineno - 1].strip()
            found.append(Mutant(path, node.lineno, text, kind, ast.unparse(node), ast.unparse(change), span))
    return found


def apply(source: str, mutant: Mutant) -> str:
    """The module with the fault."""
    content = source.encode()
    start, end = mutant.span
    return (content[:start] + f"({mutant.after})".encode() + content[end:]).decode()


def choose(
    sources: Mapping[str, str], count: int, seed: int, equivalent: tuple[Equivalent, ...] = ()
) -> tuple[list[Mutant], list[tuple[Mutant, str]]]:
    """Draws mutants: one of each module in turn, first a kind, then an expression.

    Args:
      sources: {path: text} of the modules.
      count: the number of mutants.
      seed: of the draw.
      equivalent: mutants to replace by others.

    Returns:
      (mutants, [(replaced mutant, reason)]).

    Raises:
      ValueError: the modules have fewer mutants.
    """
    reasons = {(one.path, one.text, one.after): one.reason for one in equivalent}
    draw = random.Random(seed)
    queues = [_shuffled(mutants_of(text, path), draw) for path, text in sorted(sources.items())]
    draw.shuffle(queues)
    chosen: list[Mutant] = []
    replaced: list[tuple[Mutant, str]] = []
    while len(chosen) < count:
        queues = [queue for queue in queues if queue]
        if not queues:
            raise ValueError(f"expected {count} mutants, found {len(chosen)}; ask for fewer with --count")
        for queue in queues:
            while queue and len(chosen) < count:
                mutant = queue.pop()
                reason = reasons.get((mutant.path, mutant.text, mutant.after))
                if reason is None:
                    chosen.append(mutant)
                    break
                replaced.append((mutant, reason))
    return chosen, replaced


def same_in(tree: pathlib.Path, mutant: Mutant) -> Mutant | None:
    """The mutant with the same line, expression and fault in another tree, preferably at the same path."""
    found = [
        other
        for path in sorted((tree / "ml3_jax").rglob("*.py"))
        for other in mutants_of(path.read_text(), path.relative_to(tree).as_posix())
        if (other.text, other.before, other.after) == (mutant.text, mutant.before, mutant.after)
    ]
    return min(found, key=lambda other: other.path != mutant.path, default=None)


def _shuffled(mutants: list[Mutant], draw: random.Random) -> list[Mutant]:
    """The kinds take turns, so that a rare kind is drawn as often as a common one."""
    by_kind: dict[str, list[Mutant]] = {}
    for mutant in draw.sample(mutants, len(mutants)):
        by_kind.setdefault(mutant.kind, []).append(mutant)
    rounds = sorted((number, draw.random(), mutant) for some in by_kind.values() for number, mutant in enumerate(some))
    return [mutant for *_, mutant in reversed(rounds)]


def _expressions(node: ast.AST) -> Iterator[ast.expr]:
    """Every expression that may be replaced."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_message(child):
                if isinstance(child, ast.expr):
                    yield child
                yield from _expressions(child)


def _is_message(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("warnings.warn", "print")
    return isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert)


def _changes(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """(kind, expression in its stead)."""
    for change in (_arithmetic, _comparison, _logic, _number, _name, _stop_gradient):
        yield from change(node)


def _changed(node: ast.expr, change: Callable[[ast.expr], None]) -> ast.expr:
    other = copy.deepcopy(node)
    change(other)
    return other


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _arithmetic(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not (_is_text(node.left) or _is_text(node.right)):
        yield "operator", _changed(node, lambda other: setattr(other, "op", ARITHMETIC[type(node.op)]()))
        if isinstance(node.op, ast.Mult):
            yield "dropped factor", node.left
            yield "dropped factor", node.right
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "sign", node.operand


def _comparison(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.Compare):
        first = COMPARISONS[type(node.ops[0])]()
        yield "comparison", _changed(node, lambda other: setattr(other, "ops", [first, *node.ops[1:]]))


def _logic(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.BoolOp):
        other_op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "logic", _changed(node, lambda other: setattr(other, "op", other_op))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "logic", node.operand


def _number(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """An index, an axis, a count: one more."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield "off by one", ast.Constant(node.value + 1)


def _name(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.Name) and node.id in NAMES:
        yield "min, max", ast.Name(NAMES[node.id])
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield "min, max", ast.Attribute(node.value, NAMES[node.attr])


def _stop_gradient(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """Both `stop_gradient(x)` and `jax.tree.map(stop_gradient, x)` become x."""
    if isinstance(node, ast.Call) and node.args:
        if ast.unparse(node.func).endswith("stop_gradient"):
            yield "stop_gradient", node.args[0]
        elif len(node.args) == 2 and ast.unparse(node.args[0]).endswith("stop_gradient"):
            yield "stop_gradient", node.args[1]
