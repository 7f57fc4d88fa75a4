"""Answers: loading a checkpoint to ask it, one question at a time or many at once."""
