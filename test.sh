#!/usr/bin/env bash
# Run the tests in an environment of their own; arguments go to pytest: ./test.sh tests/laws -k masks
set -eu
cd "$(dirname "$0")"
. scripts/environment.sh
environment test
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # two test processes share the cores
exec python -m pytest -n 2 "$@"
