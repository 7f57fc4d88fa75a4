"""Checkpoints turned into other checkpoints."""
