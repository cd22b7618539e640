"""Documents: every table is made from the measured data, every public name has its place, and results are no prose."""

import pathlib
import re

import pytest

import ml3_jax
from benchmarks import figures, lines, seeds, tables
from launch import experiments

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted((DOCS / "experiments").glob("*.md"))
MEASURED = re.compile(r"(?<![\w.\-/`])\d+\.\d+(?![\w.]*\d)|\d+ %")

BOUNDS = {"0.1", "0.25", "0.8", "80 %", "95 %"}  # starts, limits and aims: no results


def outside_of_tables(text: str) -> str:
    """A page without its tables and code."""
    return re.sub(r"```.*?```|`[^`]*`", "", tables.BLOCK.sub("", text), flags=re.DOTALL)


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))], ids=lambda path: str(path.relative_to(ROOT))
)
def test_tables_are_those_of_the_data(path: pathlib.Path):
    text = path.read_text()
    assert tables.written(text) == text, "python -m benchmarks.tables writes it anew"


def test_every_table_stands_in_a_document():
    found = {name for path in tables.files() for _, name, _ in tables.BLOCK.findall(path.read_text())}
    assert found == set(tables.TABLES)
    with pytest.raises(ValueError, match=r"table: expected one of .*, got 'nosuch'"):
        tables.written("<!-- table nosuch -->\n<!-- end of table -->")


def test_every_experiment_has_a_page_with_a_question_a_table_a_figure_and_at_most_five_findings():
    # Tests of the launches register an experiment of their own.
    known = {name for name, module in experiments.modules().items() if module.startswith("launch.")}
    assert {path.stem for path in PAGES} == {"index", *known}
    assert set(lines.PAGES) == known == {name for name, _ in lines.SUMMARY}
    for path in PAGES:
        if path.stem == "index":
            continue
        text = path.read_text()
        assert text.splitlines()[2].startswith("**")
        assert text.split("\n\n")[1].rstrip().endswith("?**")
        assert f"<!-- table {path.stem} -->" in text
        assert len(re.findall(r"^!\[.*\]\(\.\./figures/.*\)$", text, re.MULTILINE)) == 1
        findings = re.findall(r"^\d\. ", text.split("## Findings")[1], re.MULTILINE)
        assert 1 <= len(findings) <= 5
        first = text.split("## Findings")[1].split("2. ")[0]
        assert re.search(r"\b(holds|is mostly) ", first), first


@pytest.mark.parametrize("path", [path for path in PAGES if path.stem != "index"], ids=lambda path: path.stem)
def test_the_command_of_a_table_names_the_seeds_and_the_draw_of_its_data(path: pathlib.Path):
    commands = re.findall(r"^python -m benchmarks\.seeds --rows ([\w{},][\w{}, ]*)(.*)$", path.read_text(), re.MULTILINE)
    assert commands
    for rows, flags in commands:
        given = dict(re.findall(r"--(first_seed|draw) (\d+)", flags))
        stem, _, endings = rows.strip().removesuffix("}").partition("{")
        for row in [stem + ending for ending in endings.split(",")] if endings else rows.split():
            found, draw = tables.drawn(tables._row(row))
            assert found[0] == int(given.get("first_seed", seeds.FIRST_SEED)), row
            assert draw == int(given.get("draw", seeds.DRAW)), row


@pytest.mark.parametrize("path", [path for path in PAGES if path.stem != "index"], ids=lambda path: path.stem)
def test_findings_leave_numbers_to_the_table(path: pathlib.Path):
    findings = outside_of_tables(path.read_text().split("## Findings")[1])
    assert set(MEASURED.findall(findings)) <= BOUNDS


def test_every_public_name_has_its_place_in_the_api():
    text = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    described = set(re.findall(r"^::: ml3_jax\.([\w.]+)$", text, re.MULTILINE))
    assert set(ml3_jax.__all__) <= described
    listed = set(re.findall(r"^        - (\w+)$", text, re.MULTILINE))
    assert set(ml3_jax.losses.__all__) <= listed | {"as_loss_fn"}
    assert {f"problems.{name}" for name in ml3_jax.problems.__all__} <= described


def test_figures_exist_and_are_those_of_the_data(tmp_path: pathlib.Path):
    for path in (*DOCS.rglob("*.md"), ROOT / "README.md"):
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", path.read_text()):
            assert (path.parent / target).resolve().is_file(), target
    for name in figures.FIGURES:
        assert (DOCS / "figures" / f"results_{name}.png").is_file()
    figures.draw("digits", tmp_path / "digits.png")
    assert (tmp_path / "digits.png").stat().st_size > 10_000


def test_the_parts_of_a_line():
    line = lines.Line("", "reacher_mfrl", "return", 20, higher=True)
    values = tables.by_seed(line, "learned")
    assert values is not None
    assert values.shape == (5,)
    assert tables.by_seed(line, "plain_tuned_sgd") is not None
    assert tables.by_seed(lines.Line("", "sine", "mse", 100), "pretrained_tuned") is None
    found = tables.by_seed(lines.Line("", "shaped_sine", "parameter_error", 10, within=0.02), "learned")
    assert found is not None
    assert found.tolist() == [100.0] * 5
