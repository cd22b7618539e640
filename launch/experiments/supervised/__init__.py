"""Regression and classification: a learned loss of predictions and targets."""
