#!/bin/sh
# Brings the clients that the tests run into .cache/clients: tritonclient in a
# virtual environment, python, and the load generator, bin/perf_analyzer. Needs
# Python 3.11 or newer, and its venv, which it installs where it may.
set -eu

perf_analyzer=2.60.0     # wants glibc 2.38; elsewhere the one of
perf_analyzer_old=2.51.0 # tritonclient, which is linked to
cuda_runtime=12.9.79     # libcudart, and to libb64.so.0d

here=$(cd "$(dirname "$0")" && pwd)
dir=$(cd "$here/../../.." && pwd)/.cache/clients

say() { echo "clients: $*" >&2; }
die() { say "$*"; exit 1; }

python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "needs Python 3.11 or newer as python3"

want=$({ cat "$here/requirements.txt" "$0"; python3 -VV; echo "$dir"; } | cksum)
[ "$(cat "$dir/stamp" 2>/dev/null || true)" != "$want" ] || exit 0

as_root() {
	if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

# apt runs apt-get, and once more with fresh package lists where it fails.
apt() {
	"$@" >/dev/null 2>&1 || { as_root apt-get -qq update >&2 && "$@" >&2; }
}

if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
	say "installing python3-venv"
	apt as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends python3-venv ||
		die "Python's venv is missing: install it and run this again, for example: sudo apt-get install python3-venv"
fi

say "making $dir"
rm -rf "$dir"
mkdir -p "$dir/bin"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$dir/python"
pip() { "$dir/python/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install -q --no-deps -r "$here/requirements.txt"
pip check >"$tmp/check" || die "$(cat "$tmp/check")"

# The name has a placeholder, 0.1.0, for systems without a wheel: hence the pin.
if pip install -q --no-deps "perf-analyzer==$perf_analyzer" 2>"$tmp/why"; then
	package=$("$dir/python/bin/python" -c 'import perf_analyzer; print(perf_analyzer.__path__[0])')
	ln -s "$package/bin/perf_analyzer" "$dir/bin/perf_analyzer"
else
	say "perf_analyzer $perf_analyzer does not install here, taking $perf_analyzer_old"
	lib=$dir/lib
	pip download -q --no-deps --only-binary :all: -d "$tmp" "tritonclient==$perf_analyzer_old"
	python3 -m zipfile -e "$tmp"/tritonclient-*.whl "$tmp/client"
	pip install -q --no-deps --target "$tmp/cuda" "nvidia-cuda-runtime-cu12==$cuda_runtime"
	(cd "$tmp" && apt apt-get -qq download libb64-0d && dpkg -x libb64-0d_*.deb "$tmp/b64") ||
		die "could not fetch the Debian package libb64-0d, which perf_analyzer $perf_analyzer_old needs"
	mkdir "$lib"
	cp -P "$tmp"/cuda/nvidia/cuda_runtime/lib/libcudart.so.12* "$tmp"/b64/usr/lib/*/libb64.so.0d* "$lib"
	cp "$tmp"/client/tritonclient-*.data/data/bin/perf_analyzer "$lib/perf_analyzer"
	chmod +x "$lib/perf_analyzer"
	cat >"$dir/bin/perf_analyzer" <<END
#!/bin/sh
LD_LIBRARY_PATH='$lib' exec '$lib/perf_analyzer' "\$@"
END
	chmod +x "$dir/bin/perf_analyzer"
fi
"$dir/bin/perf_analyzer" --version >"$tmp/version" 2>&1 || die "perf_analyzer does not run: $(cat "$tmp/version" "$tmp/why")"

echo "$want" >"$dir/stamp"
