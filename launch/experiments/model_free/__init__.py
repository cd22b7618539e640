"""Control from sampled trajectories alone (paper, section IV-C2)."""
