"""Look for a tokenizer that is nowhere; print the sentence, and the seconds that it took on a line of its own."""

import sys
import time

from model.data.tokenizer import find_tokenizer
from model.errors import exit_on_input_error

start = time.monotonic()
try:
    with exit_on_input_error("find_tokenizer.py"):
        print(find_tokenizer(sys.argv[1]))
finally:
    print(f"{time.monotonic() - start:.2f}")
