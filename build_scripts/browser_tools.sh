#!/usr/bin/env bash
# Installs what the tests of the page need: tests/browser/package-lock.json, and a browser where that is possible.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
bash "$here/need_node.sh" browser-tools
cd "$here/../tests/browser"
npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
if ! command -v chromium >/dev/null && ! command -v chromium-browser >/dev/null && ! command -v google-chrome >/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "browser-tools: installing chromium"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core
  else
    echo "browser-tools: NO BROWSER, so the page is not tested: install one (Debian: apt-get install chromium)" >&2
  fi
fi
touch node_modules/installed
