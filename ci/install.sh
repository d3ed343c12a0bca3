#!/usr/bin/env bash
# Makes the virtual environment of the CPU test bed: an unmodified sglang, tiny-model tooling, and this project (editable).
# A second run with unchanged inputs returns at once. Needs apt-get (as root or with sudo) only for what is missing.
#
#   VENV=<dir>             where the environment goes (default: .venv at the repository root)
#   TORCH_PIP_ARGS=<args>  more arguments for the torch step, e.g. an index that serves CPU builds: where the default index
#                          serves CUDA builds, several GB would come along otherwise
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
VENV="${VENV:-.venv}"
STAMP="$VENV/.installed"
LOG=""
STEPS=9
step_number=0
shopt -s lastpipe
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 DEBIAN_FRONTEND=noninteractive

die() {
    echo "ci/install.sh: $*" >&2
    exit 1
}

fingerprint() {
    {
        # Of pyproject.toml only what describes the package: what follows configures tools and installs nothing.
        sed '/^\[tool\.ruff\]/,$d' pyproject.toml
        cat sglang_mm_conn/__init__.py
        find ci/requirements.txt ci/constraints.txt ci/install.sh ci/cpu_bed \
            \( -name build -o -name '*.egg-info' -o -name __pycache__ \) -prune -o -type f -print0 |
            LC_ALL=C sort -z | xargs -0 sha256sum
    } | sha256sum | cut -d' ' -f1
}

# step TITLE COMMAND...: one numbered line; the command's output goes to the log, whose end is shown if the command fails.
step() {
    local title="$1" start=$SECONDS status=0
    shift
    step_number=$((step_number + 1))
    printf '[%d/%d] %-58s' "$step_number" "$STEPS" "$title"
    echo "== $title: $*" >>"$LOG"
    # Not in an `if`: that would switch `set -e` off inside the functions that are run as a step.
    set +e
    (set -e; "$@") >>"$LOG" 2>&1
    status=$?
    set -e
    if [ "$status" -ne 0 ]; then
        echo ' FAILED'
        tail -n 25 "$LOG" >&2
        die "step $step_number ($title) failed with status $status; everything it printed is in $LOG"
    fi
    printf ' %4d s\n' $((SECONDS - start))
}

has_library() {
    PATH="$PATH:/usr/sbin:/sbin" ldconfig -p 2>/dev/null | grep -q "$1"
}

runs() {
    command -v "$1" >/dev/null && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

missing_packages() {
    has_library libibverbs.so.1 || echo libibverbs1
    has_library librdmacm.so.1 || echo librdmacm1
    has_library libnuma.so.1 || echo libnuma1
    command -v make >/dev/null || echo make
    # Debian keeps it in /sbin, which is not on everybody's PATH. For cutting networks in tests.
    PATH="$PATH:/usr/sbin:/sbin" command -v ip >/dev/null || echo iproute2
    if [ -z "$PYTHON" ]; then
        printf '%s\n' python3 python3-venv
    elif ! "$PYTHON" -c 'import ensurepip' 2>/dev/null; then
        "$PYTHON" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'
    fi
}

install_packages() {
    local packages=("$@") as_root=()
    [ ${#packages[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null ||
        { echo "missing: ${packages[*]} (Debian's names), and there is no apt-get: install them by hand"; return 1; }
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null ||
            { echo "missing: ${packages[*]}; run as root: apt-get install ${packages[*]}"; return 1; }
        as_root=(sudo)
    fi
    "${as_root[@]}" apt-get update -q
    "${as_root[@]}" apt-get install -y -q --no-install-recommends "${packages[@]}"
}

find_python() {
    local candidate
    PYTHON=""
    for candidate in python3.11 python3; do
        if runs "$candidate"; then
            PYTHON="$candidate"
            return
        fi
    done
    if command -v python3 >/dev/null; then
        die "$(python3 --version 2>&1) is too old: the test bed needs 3.11 or newer (3.11 is what it was tried with)"
    fi
}

make_environment() {
    if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ] && [ "$(ls -A "$VENV")" != install.log ]; then
        echo "VENV=$VENV exists and is no virtual environment"
        return 1
    fi
    "$VENV/bin/python" -m pip --version || "$PYTHON" -m venv "$VENV" || return 1
    pip_install --upgrade pip setuptools wheel
}

pip_install() {
    "$VENV/bin/python" -m pip install --constraint ci/constraints.txt "$@"
}

check() {
    "$VENV/bin/python" - <<'EOF'
import importlib.metadata as metadata
import torch, torchvision, triton, sgl_kernel, sglang, transformers
from mooncake.engine import TransferEngine

print("torch", torch.__version__, "sglang", sglang.__version__, "transformers", transformers.__version__)
names = {entry.name for entry in metadata.entry_points(group="sglang.srt.plugins")}
assert {"cpu_bed", "conn_multimodal"} <= names, f"sglang plugins found: {sorted(names)}"
EOF
}

print_fingerprint="$(fingerprint)"
if [ "$(cat "$STAMP" 2>/dev/null)" = "$print_fingerprint" ]; then
    exit 0
fi

begin=$SECONDS
mkdir -p "$VENV"
LOG="$VENV/install.log"
: >"$LOG"
rm -f "$STAMP"
find_python
missing_packages | mapfile -t packages
echo "Installing the CPU test bed into $VENV (log: $LOG)"
step "Debian packages${packages[*]:+: ${packages[*]}}" install_packages "${packages[@]}"
[ -n "$PYTHON" ] || find_python
[ -n "$PYTHON" ] || die "no python3 of version 3.11 or newer was found"
step "virtual environment ($("$PYTHON" --version))" make_environment
# torch before all else: a package that pulls it as a dependency pulls CUDA with it.
# shellcheck disable=SC2086  # TORCH_PIP_ARGS is a list of words
step "torch" pip_install ${TORCH_PIP_ARGS:-} torch
step "what sglang imports, and the test tools" pip_install --requirement ci/requirements.txt
# Without dependencies: theirs would bring CUDA libraries and triton, which ci/cpu_bed stands in for.
step "sglang, torchvision, xgrammar" pip_install --no-deps sglang torchvision xgrammar
step "Mooncake transfer engine" pip_install --no-deps mooncake-transfer-engine-non-cuda
step "CPU bed (stand-ins for what needs CUDA)" pip_install --no-deps --no-build-isolation --force-reinstall ./ci/cpu_bed
step "this project" pip_install --no-deps --no-build-isolation --editable .
step "check that everything imports" check
echo "$print_fingerprint" >"$STAMP"
echo "Installed in $((SECONDS - begin)) s"
