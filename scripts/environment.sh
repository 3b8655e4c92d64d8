#!/usr/bin/env bash
# Makes .venv beside the project and installs a requirements file into it; sourced by the two
# commands of the README. Installs nothing where that was done already for the same files.

python_of_project() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.10 or newer with its venv module is needed: install it, or set PYTHON" >&2
    return 2
}

make_environment() {
    local requirements="$1" python stamp marker
    if [ ! -x .venv/bin/python ]; then
        python="$(python_of_project)" || return 2
        echo "making .venv with $("$python" --version)"
        "$python" -m venv .venv
    fi
    stamp="$(cat requirements*.txt constraints.txt | cksum | cut -d' ' -f1)"
    marker=".venv/installed-$(basename "$requirements" .txt)-$stamp"
    if [ ! -e "$marker" ]; then
        echo "installing $requirements (the first time takes a few minutes)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check \
            -r "$requirements" -c constraints.txt
        touch "$marker"
    fi
}
