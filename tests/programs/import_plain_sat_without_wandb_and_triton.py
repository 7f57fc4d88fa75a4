"""Imports SAT plainly, as if wandb and triton weren't installed."""

import sys

sys.modules["wandb"] = sys.modules["triton"] = None  # type: ignore[assignment]

import sat  # noqa: F401
