"""Control through a learned model of the system (paper, section IV-C1)."""
