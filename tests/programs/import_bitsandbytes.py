"""Prints whether bitsandbytes is imported before and after it is needed."""

import sys

from model import frozen

print("bitsandbytes" in sys.modules)
frozen.import_bitsandbytes()
print("bitsandbytes" in sys.modules)
