# Sourced by demo.sh, test.sh and .ci/run: `environment [EXTRAS]` makes .venv with the tested versions and enters it.
# PYTHON names the interpreter (3.11 or later), VENV another folder. Nothing is installed twice.

environment() {
    extras=${1:-}
    venv=${VENV:-.venv}
    if [ ! -x "$venv/bin/python" ]; then
        python=$(interpreter)
        "$python" -m venv "$venv"
    fi
    # shellcheck disable=SC1091
    . "$venv/bin/activate"
    stamp="$venv/.installed-${extras:-plain}-$(cat pyproject.toml constraints.txt | cksum | tr -d ' ')"
    if [ ! -e "$stamp" ]; then
        echo "Installing Prunus into $venv (torch is large: some minutes the first time) ..."
        python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extras:+[$extras]}"
        : >"$stamp"
    fi
}

interpreter() {
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Prunus needs Python 3.11 or later for this; set PYTHON=/path/to/python3.11" >&2
    return 1
}
