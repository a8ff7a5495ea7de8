#!/usr/bin/env bash
# Installs what contracts/package-lock.json pins: the compiler, anvil, forge, and what the tests compare with.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
bash "$here/need_node.sh" chain-tools
cd "$here/../contracts"
# The tools' install scripts only look for the binaries that are packages of their own.
npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
touch node_modules/installed
