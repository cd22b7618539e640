"""Figures of runs, losses and rollouts. They draw arrays and the content of meta_test.json."""
