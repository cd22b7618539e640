"""A learned loss in training loops of your own. Each file runs alone: python -m examples.NAME."""
