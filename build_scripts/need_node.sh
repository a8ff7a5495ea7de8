#!/usr/bin/env bash
# Ends with what is needed, in the name of the caller ($1), unless Node.js is here: one minimum for all that comes from
# npm, the highest that any package asks for.
set -euo pipefail
if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
  echo "$1: Node.js 20.19 or newer with npm is needed; Debian 12's own is older: nodejs.org has packages" >&2
  exit 1
fi
version=$(node --version)
IFS=. read -r major minor _ <<<"${version#v}"
if ((major < 20 || (major == 20 && minor < 19))); then
  echo "$1: Node.js 20.19 or newer is needed, this is $version" >&2
  exit 1
fi
