"""Import the command line, and print which large packages came with it."""

import sys

import model.cli.options  # noqa: F401  (what it imports is the question)

print(sorted({"torch", "sat", "numpy", "deepspeed"} & set(sys.modules)))
