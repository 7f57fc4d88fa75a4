# Sourced by the other scripts, in the project's folder. Afterwards $python is a Python that has the packages of
# requirements.txt.
#
#   source scripts/setup.sh [more-requirements.txt …]
#
# An active environment (venv or conda) is used as it is. Otherwise .venv is made in the project's folder. A second run
# installs nothing.

fail() { echo "$*" >&2; exit 1; }

usable_python() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    python=$(command -v python) || fail "An environment is active, but it has no python."
    usable_python "$python" || fail "The active environment has $("$python" --version); Python 3.11 or 3.12 is needed."
else
    if ! usable_python .venv/bin/python; then
        for candidate in python3 python3.12 python3.11; do
            usable_python "$candidate" && break
            candidate=
        done
        [ -n "$candidate" ] || fail "No Python 3.11 or 3.12 found; install one of them."
        rm -rf .venv
        "$candidate" -m venv .venv || fail "$candidate could not make .venv; on Debian and Ubuntu: apt-get install python3-venv."
    fi
    python=$PWD/.venv/bin/python
    export PATH="$PWD/.venv/bin:$PATH"
fi

for requirements in requirements.txt "$@"; do
    # The stamp is named after the file's content, so that a file is installed again only if it has changed.
    stamp=$("$python" -c '
import hashlib, pathlib, sys
print(pathlib.Path(sys.prefix, ".installed-" + hashlib.sha256(pathlib.Path(sys.argv[1]).read_bytes()).hexdigest()[:16]))
' "$requirements")
    if [ ! -e "$stamp" ]; then
        echo "Installing $requirements …"
        "$python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
        touch "$stamp"
    fi
done
