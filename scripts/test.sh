#!/usr/bin/env bash
# Sets up as quickstart.sh does, then runs all tests, two files at a time. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh tests/requirements.txt
exec "$python" -m pytest tests -p no:cacheprovider -n 2 --dist loadfile "$@"
