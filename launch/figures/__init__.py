"""Figures of runs, losses and rollouts; they draw arrays and the content of meta_test.json."""
