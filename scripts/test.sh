#!/usr/bin/env bash
# Sets up as quickstart.sh does, then runs all tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh tests/requirements.txt
exec "$python" -m pytest tests -p no:cacheprovider "$@"
