#!/usr/bin/env bash
# Makes the project's environment in the directory given: exactly what requirements.lock pins.
set -euo pipefail
venv=$1
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ "$version" != 3.11 ]; then
  echo "setup: Python 3.11 is needed, $python is $version: set PYTHON=/path/to/python3.11" >&2
  exit 1
fi
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
  echo "setup: this Python has no venv module (Debian: apt-get install python3-venv)" >&2
  exit 1
fi
echo "setup: making $venv with $python ($version)"
"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-input)
"${pip[@]}" "$(grep '^torch==' requirements.lock)"
"${pip[@]}" --requirement requirements.lock
"${pip[@]}" --no-deps --no-build-isolation --editable .
touch "$venv/installed"
echo "setup: done"
