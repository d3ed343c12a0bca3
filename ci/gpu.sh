#!/usr/bin/env bash
# On a machine with a GPU and no network: everything that a GPU can show, in at most five minutes, from the kit alone.
#
#   make gpu-kit                       elsewhere, with a network: makes build/gpu-kit; take it along with the repository
#   ci/gpu.sh                          there: results in build/gpu (gpu.json, gpu.md, gpu.log)
#   ci/gpu.sh --device cpu             a rehearsal without a GPU
#   python -m tests.gpu --write FILE   afterwards: puts a gpu.json into docs/results/gpu.md
#
# Options: --kit DIR (build/gpu-kit), --python COMMAND (python3: one that has torch), and those of `python -m tests.gpu`.
# The kit is installed into a temporary folder, which goes again; nothing else on the machine changes.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
KIT="$ROOT/build/gpu-kit"
PYTHON=python3
DEVICE=cuda
OPTIONS=()

die() {
    echo "ci/gpu.sh: $*" >&2
    exit 1
}

while [ $# -gt 0 ]; do
    case "$1" in
        --kit | --python | --device | --out)
            [ $# -ge 2 ] || die "$1 needs a value"
            case "$1" in
                --kit) KIT="$(cd "$2" && pwd)" || die "--kit: there is no folder $2" ;;
                --python) PYTHON="$2" ;;
                --device) DEVICE="$2" ;;
                --out) OPTIONS+=(--out "$(realpath -m "$2")") ;;
            esac
            shift 2
            ;;
        -h | --help)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *)
            OPTIONS+=("$1")
            shift
            ;;
    esac
done

[ -f "$KIT/kit.json" ] || die "$KIT holds no kit: run 'make gpu-kit' on a machine with a network"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' ||
    die "the kit's wheels are for Python 3.12, and $PYTHON is not: choose one with --python"
"$PYTHON" - <<'EOF' || die "the kit does not hold these: install them first, or choose another Python with --python"
import importlib.util, sys
needed = "aiohttp httpx hypothesis matplotlib numpy packaging PIL pip prometheus_client psutil pytest requests rich scipy torch torchvision transformers"
missing = [name for name in needed.split() if importlib.util.find_spec(name) is None]
print(*(f"missing: {name}" for name in missing), sep="\n", end="\n" if missing else "", file=sys.stderr)
sys.exit(bool(missing))
EOF

SITE="$(mktemp -d)"
trap 'rm -rf "$SITE"' EXIT
wheels=("$KIT"/*.whl)
if [ "$DEVICE" = cpu ]; then
    # Mooncake's CUDA build cannot be loaded without a driver; the kit's neighbour holds the one for a rehearsal.
    ls "$KIT-cpu"/*.whl >/dev/null || die "$KIT-cpu holds no Mooncake for a rehearsal: run 'make gpu-kit'"
    mapfile -t wheels < <(ls "$KIT"/*.whl "$KIT-cpu"/*.whl | grep -v 'mooncake_transfer_engine_cuda')
fi
echo "installing ${#wheels[@]} wheels into $SITE"
"$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --root-user-action=ignore --no-warn-script-location --target "$SITE" "${wheels[@]}"

"$PYTHON" "$ROOT/ci/gpu/add_libraries.py" "$KIT/libraries.tar.xz" "$SITE/lib"

export PYTHONPATH="$SITE:$ROOT"
export LD_LIBRARY_PATH="$SITE/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
cd "$ROOT"
"$PYTHON" -c 'import torch, mooncake.engine' ||
    echo "ci/gpu.sh: Mooncake's engine cannot be loaded here (see above): its steps will fail, the others go on" >&2
df -h /dev/shm
"$PYTHON" -m tests.gpu --device "$DEVICE" --stand-ins ci/gpu/stand_ins ${OPTIONS[@]+"${OPTIONS[@]}"}
