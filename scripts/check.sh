#!/usr/bin/env bash
# Format, lint, types and the quick tests, in a minute or two: run it before each commit.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh tests/requirements.txt
"$python" -m ruff format --check .
"$python" -m ruff check .
"$python" -m mypy
tests=(tests)
for word in "$@"; do if [ -e "${word%%::*}" ]; then tests=(); fi; done
exec "$python" -m pytest "${tests[@]}" -p no:cacheprovider -q -n 2 -m "not run and not slow and not long" "$@"
