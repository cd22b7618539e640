"""An arm learns its inertia from its own measurements (paper, section IV-D)."""
