"""The rows of the benchmark of estimators, on a size that compiles fast. No test reads a clock."""

from benchmarks import estimators


def test_there_is_a_row_for_each_estimator_and_truncated_backpropagation_is_biased():
    rows = [estimators.Row("backprop", False), estimators.Row("backprop", True), estimators.Row("pes", True, 2)]
    whole, truncated, persistent = estimators.measure(4, 1, loops=100, rounds=1, rows=tuple(rows))
    assert [row["estimator"] for row in (whole, truncated, persistent)] == ["backprop", "backprop", "pes"]
    assert [row["unroll"] for row in (whole, truncated, persistent)] == [4, 1, 1]
    assert all(row["mb_temporaries"] > 0 and row["ms"] > 0 for row in (whole, truncated, persistent))
    assert whole["times_backprop"] == 1.0
    # The t-th unroll of 4 gets about 1 / t of its gradient: 4 / 10 of the whole in the mean.
    assert whole["bias"] < 2 * whole["bias_error"] < 0.3
    assert 0.5 < truncated["bias"] < 0.7
    assert truncated["bias"] > 4 * truncated["bias_error"]
    assert persistent["bias"] < 2 * persistent["bias_error"] < 0.6
    assert persistent["variance"] > truncated["variance"]
    assert persistent["mb_state"] > truncated["mb_state"] > whole["mb_state"]
