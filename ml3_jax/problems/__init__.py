"""Problem families, one file each: they build a `Problem` and hold nothing of the loops."""
