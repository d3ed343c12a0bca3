#!/usr/bin/env bash
# Rehearses ci/gpu.sh without a GPU, with no more than travels: a fresh clone of HEAD and the kit, an empty HOME and
# environment, and a network namespace that holds a loopback device only. Needs root, a Python 3.12, and build/gpu-kit.
#
#   ci/gpu/rehearse.sh PYTHON      a Python 3.12; an environment with ci/gpu/machine.txt is made from it in
#                                  build/gpu-machine the first time (several GB are downloaded)
#
# Results: build/gpu-rehearsal (gpu.json, gpu.md, gpu.log).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

[ $# -eq 1 ] || { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 2; }
[ -f build/gpu-kit/kit.json ] || { echo "rehearse.sh: no kit in build/gpu-kit: make gpu-kit" >&2; exit 1; }
MACHINE=build/gpu-machine
if [ ! -e "$MACHINE/.installed" ]; then
    "$1" -m venv "$MACHINE"
    "$MACHINE/bin/python" -m pip install --quiet --requirement ci/gpu/machine.txt
    touch "$MACHINE/.installed"
fi

TRIP="$(mktemp -d)"
trap 'rm -rf "$TRIP"' EXIT
git clone --quiet . "$TRIP/repository"
mkdir -p "$TRIP/repository/build" "$TRIP/home" build/gpu-rehearsal
cp -r build/gpu-kit build/gpu-kit-cpu "$TRIP/repository/build/"
python="$(pwd)/$MACHINE/bin/python"
# shellcheck disable=SC2016  # expanded inside the namespace
unshare --net bash -c 'PATH="$PATH:/usr/sbin:/sbin" ip link set lo up && exec env -i HOME="$1" PATH=/usr/bin:/bin \
    "$2/ci/gpu.sh" --device cpu --python "$3" --out "$4"' \
    rehearse "$TRIP/home" "$TRIP/repository" "$python" "$(pwd)/build/gpu-rehearsal"
