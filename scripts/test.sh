#!/usr/bin/env bash
# Sets up as quickstart.sh does, then runs all tests, two files at a time. Arguments go to pytest: -x, or the tests to run.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh tests/requirements.txt
tests=(tests)
for word in "$@"; do if [ -e "${word%%::*}" ]; then tests=(); fi; done
exec "$python" -m pytest "${tests[@]}" -p no:cacheprovider -n 2 --dist loadfile "$@"
