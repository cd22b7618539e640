"""Entry points that meta-train and meta-test a learned loss, and what they write; runs from a clone, not installed."""
