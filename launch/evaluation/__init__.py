"""Meta-test: curves, tuned step sizes, baselines, and the content of meta_test.json."""
