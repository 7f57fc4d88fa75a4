"""Imports a module, the first word, and prints which of the modules named by the other words are loaded then."""

import importlib
import sys

if __name__ == "__main__":
    module, *others = sys.argv[1:]
    importlib.import_module(module)
    print(sorted(set(others) & set(sys.modules)))
