#!/usr/bin/env bash
# Installs what contracts/package-lock.json pins: the compiler, anvil, forge, and what the tests compare with.
set -euo pipefail
cd "$(dirname "$0")/../contracts"
if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
  echo "chain-tools: Node.js 18 or newer with npm is needed (Debian: apt-get install nodejs npm)" >&2
  exit 1
fi
version=$(node --version)
major=${version#v}
if [ "${major%%.*}" -lt 18 ]; then
  echo "chain-tools: Node.js 18 or newer is needed, this is $version" >&2
  exit 1
fi
# The tools' install scripts only look for the binaries that are packages of their own.
npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
touch node_modules/installed
