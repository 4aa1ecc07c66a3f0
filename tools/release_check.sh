#!/bin/bash
# What must hold before a release and is too long for .ci/run: every architecture in the CUDA wheel, the wheel on every
# Python that can be had, long fuzzing, arm64 where its target exists. Its log is build/release-check.log.
# Needs what .ci/run needs, and hours. FUZZ_SECONDS: of each fuzzer (3600).
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build
exec > >(tee build/release-check.log) 2>&1
step() { printf '\n==== %s (%d s)\n' "$*" "$SECONDS"; }
tools=$PWD/.venv/wheels-env/bin
date -u; git describe --always --dirty; uname -a

step "the CPU wheel, and the CUDA wheel with every architecture"
make wheels
wheel=$(ls dist/cpu/*.whl)

step "the wheel on this machine's Python"
.venv/bin/python tools/try_wheel.py "$wheel" --pytest
for release in 3.13:trixie 3.14:sid; do
    version=${release%:*} suite=${release#*:}
    step "the wheel on Python $version of Debian $suite"
    directory=build/python/$version
    python=$(PATH=$tools:$PATH tools/debian_python.sh "$version" "$suite" "$directory")
    "$python" tools/try_wheel.py "$wheel" --pytest --pip "$directory"/usr/share/python-wheels/pip-*.whl
done
for python in python3.12 python3.13t python3.14t; do
    command -v "$python" >/dev/null || echo "UNTESTED: there is no $python on this machine"
done
if command -v python3.12 >/dev/null; then python3.12 tools/try_wheel.py "$wheel" --pytest; fi

# A target that the Makefile lacks is named, not passed over.
for target in fuzz tsan arm64; do
    step "make $target"
    if ! make -n "$target" >/dev/null 2>&1; then
        echo "UNTESTED: the Makefile has no target $target"
        continue
    fi
    make "$target" PYTHON="$PWD/.venv/bin/python" SECONDS="${FUZZ_SECONDS:-3600}"
done

step "everything of .ci/run"
.ci/run
step "passed"
grep -E '^UNTESTED' build/release-check.log || true
