#!/usr/bin/env bash
# Wheels of bench/wheels.txt for a GPU machine without a network: Linux on x86-64.
#
#   bash bench/wheels.sh DIR [PYTHON=3.12]     then, there: WHEELS=DIR bash bench/gpu.sh OUT
set -euo pipefail
folder=${1:?the folder of the wheels} version=${2:-3.12}
platforms=()
for glibc in 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
"${PIP:-pip}" download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version "$version" --implementation cp "${platforms[@]}" \
    --platform manylinux2014_x86_64 --dest "$folder" --requirement "$(dirname "$0")/wheels.txt"
du -sh "$folder"
