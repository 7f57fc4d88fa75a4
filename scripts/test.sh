#!/usr/bin/env bash
# Sets up as quickstart.sh does, then runs the tests, two files at a time. Arguments go to pytest: -x, or the tests to run.
# Those marked "long" repeat a fault in further settings, and are left out unless they are asked for: -m long.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh tests/requirements.txt
tests=(tests)
for word in "$@"; do if [ -e "${word%%::*}" ]; then tests=(); fi; done
exec "$python" -m pytest "${tests[@]}" -p no:cacheprovider -n 2 --dist loadfile -m "not long" "$@"
