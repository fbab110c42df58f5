#!/usr/bin/env bash
# Prune the embedded model, retrain a sliver of it, show what happened: environment and all, offline once installed.
set -eu
cd "$(dirname "$0")"
. scripts/environment.sh
environment
exec prunus demo "$@"
