"""The rows of the benchmark of gradient modes, on a size that compiles fast. No test reads a clock."""

from benchmarks import gradient_modes
from ml3_jax.types import GRADIENT_MODES


def test_there_is_a_row_for_each_mode_with_memory_and_time():
    rows = gradient_modes.measure(2, 3, rounds=1)
    assert [row["mode"] for row in rows] == list(GRADIENT_MODES)
    assert all(row["mb"] > 0 and row["ms"] > 0 for row in rows)
    assert rows[0]["times_mixed"] == 1.0
