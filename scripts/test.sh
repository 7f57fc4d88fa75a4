#!/usr/bin/env bash
# Sets up as quickstart.sh does, then runs the tests, two files at a time. Arguments go to pytest: -x, or the tests to run.
# Those marked "long" repeat a fault in further settings, and are left out unless they are asked for: -m long.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh tests/requirements.txt
unset PYTHONDONTWRITEBYTECODE # pytest keeps the tests as it has compiled them, and collects them in half the time
tests=(tests)
for word in "$@"; do if [ -e "${word%%::*}" ]; then tests=(); fi; done
# One thread each: the models of the tests are too small to share, and two threads of two files get into each other's way.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Files go to whoever is free in the order of tests/conftest.py.
exec "$python" -m pytest "${tests[@]}" -p no:cacheprovider -n 2 --dist loadfile --no-loadscope-reorder -m "not long" "$@"
