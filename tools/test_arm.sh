#!/usr/bin/env bash
# Run the kernel and packing tests on an emulated 64-bit ARM processor (qemu-user). Works on Debian, without root.
#
#   tools/test_arm.sh                  run the default selection
#   tools/test_arm.sh ARGUMENTS...     run pytest with other arguments
#
# The first run downloads qemu, an ARM Python and ARM wheels into $ARM (default: .arm, about 1 GB). It changes nothing
# outside this folder. Compiling the kernels in the emulator takes several minutes; the compiled code is kept in $ARM.
set -euo pipefail

# The newest PyTorch whose ARM wheel is built without CUDA. Wheels with CUDA do not load without a GPU's libraries.
torch=2.9.1
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
arm=${ARM:-$root/.arm}
python=$arm/python

skip() { echo "make test-arm: skipped: $1" && exit 0; }

[[ -r /etc/os-release && $(. /etc/os-release && echo "${ID:-}") == debian ]] || skip "it needs Debian"
host=$(dpkg --print-architecture)
[[ $host != arm64 ]] || skip "this processor is 64-bit ARM; run make test"

# unpack ARCHITECTURE FOLDER PACKAGE...: unpack packages and their dependencies into a folder, without installing them.
unpack() {
  local architecture=$1 folder=$2 apt=$arm/apt-$1 archive
  shift 2
  mkdir -p "$apt"/{lists,archives}/partial "$folder"
  touch "$apt/status"
  local options=(-qq -o APT::Architecture="$architecture" -o APT::Architectures::="$architecture"
    -o Dir::State::lists="$apt/lists" -o Dir::State::status="$apt/status" -o Dir::Cache="$apt"
    -o APT::Install-Recommends=false -o APT::Sandbox::User= -o Debug::NoLocking=true)
  apt-get "${options[@]}" update
  apt-get "${options[@]}" --yes --download-only install "$@" >/dev/null
  for archive in "$apt"/archives/*.deb; do dpkg-deb --extract "$archive" "$folder"; done
  rm -r "$apt"
}

install() {
  echo "installing an ARM Python into $arm (once)"
  mkdir -p "$arm"
  unpack "$host" "$arm/qemu" qemu-user-static
  unpack arm64 "$arm/system" python3 python3-pip libgomp1 libstdc++6
  # With this script as argv[0], sys.executable is this script, so that tests can start Python too.
  cat >"$python" <<END
#!/bin/sh
export PYTHONHOME="$arm/system/usr" PYTHONPATH="$root:$root/tests:$arm/site" NUMBA_CACHE_DIR="$arm/numba"
exec "$arm/qemu/usr/bin/qemu-aarch64-static" -cpu max -L "$arm/system" -0 "$python" "$arm/system/usr/bin/python3" "\$@"
END
  chmod +x "$python"
  "$python" - "$root/pyproject.toml" >"$arm/requirements.txt" <<'END'
import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    print(*tomllib.load(file)["project"]["dependencies"], "pytest", "pytest-timeout", "hypothesis", "psutil", sep="\n")
END
  "$python" -m pip install -qq --no-compile --target "$arm/site" "torch==$torch" --requirement "$arm/requirements.txt"
  touch "$arm/installed-$torch"
}

[[ -e $arm/installed-$torch ]] || install
(($#)) || set -- -m "not slow" tests/kernels tests/packed --ignore=tests/kernels/test_cuda.py
cd "$root"
"$python" -c 'import platform, torch; print("PyTorch", torch.__version__, "on", platform.machine())'
OMP_NUM_THREADS=1 "$python" -m pytest --timeout=0 -p no:cacheprovider "$@"
