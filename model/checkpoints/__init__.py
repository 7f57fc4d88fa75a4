"""Checkpoints in SAT's layout: finding, reading and writing them, and what they say of themselves."""
