#!/usr/bin/env bash
# Format, lint, types and the quick tests, in about a minute: run it before each commit.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh tests/requirements.txt
"$python" -m ruff format --check .
"$python" -m ruff check .
"$python" -m mypy
unset PYTHONDONTWRITEBYTECODE # pytest keeps the tests as it has compiled them, and collects them in half the time
tests=(tests)
for word in "$@"; do if [ -e "${word%%::*}" ]; then tests=(); fi; done
exec "$python" -m pytest "${tests[@]}" -p no:cacheprovider -q -n 2 --dist worksteal -m "not run and not slow and not long" "$@"
