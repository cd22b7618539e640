"""A row of the benchmark of large optimizees, on a size that compiles fast. No test reads a clock."""

from benchmarks import large_optimizees, transformer


def test_a_row_has_memory_and_time_beside_the_activations_of_a_step():
    row = large_optimizees.measure(transformer.Shape(32, 1, sequences=1, tokens=4), "Adam", "nested", rounds=1)
    assert row["parameters"] == 12 * 32**2 + (transformer.VOCABULARY + 4) * 32
    assert row["theta_bytes"] == 4 * row["parameters"]
    assert min(row[name] for name in ("temporaries", "activations", "arguments", "outputs", "seconds")) > 0
