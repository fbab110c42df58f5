#!/usr/bin/env bash
# Prune the embedded model, retrain a sliver of it, show what happened: environment and all, offline once installed.
# `./demo.sh vision` does it with a classifier of handwritten digits.
set -eu
cd "$(dirname "$0")"
. scripts/environment.sh
if [ "${1:-}" = vision ]; then environment images; else environment; fi
exec prunus demo "$@"
