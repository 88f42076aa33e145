#!/bin/sh
# Builds dunlin-agent for linux/arm64 into bin/linux-arm64/, for glibc 2.31 and
# newer, with the C compiler of Zig, which Python's registry has. Zig lies in
# .cache/zig, checked by SHA-256. VERSION is the version that it is built as;
# without it, the one that the source is of.
set -eu

zig=0.17.1
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)

say() { echo "cross: $*" >&2; }
die() { say "$*"; exit 1; }

if [ "$(cat "$root/.cache/zig/version" 2>/dev/null || true)" != "$zig" ]; then
	if python3 -m pip --version >/dev/null 2>&1; then
		pip="python3 -m pip"
	elif command -v pip3 >/dev/null; then
		pip=pip3
	elif command -v pip >/dev/null; then
		pip=pip
	else
		die "needs pip, to fetch the C compiler"
	fi
	say "fetching Zig $zig"
	rm -rf "$root/.cache/zig"
	mkdir -p "$root/.cache"
	tmp=$(mktemp -d "$root/.cache/zig.XXXXXX")
	trap 'rm -rf "$tmp"' EXIT
	trap 'exit 1' HUP INT TERM
	# Nothing of it is installed: a wheel is an archive of files.
	$pip download --disable-pip-version-check --quiet --no-deps --only-binary=:all: --require-hashes \
		--dest "$tmp/wheel" --requirement "$here/requirements.txt" || die "pip did not bring Zig $zig"
	python3 -m zipfile -e "$tmp"/wheel/*.whl "$tmp/zig"
	rm -rf "$tmp/wheel"
	chmod +x "$tmp/zig/ziglang/zig"
	echo "$zig" >"$tmp/zig/version"
	mv "$tmp/zig" "$root/.cache/zig"
fi

# NVML's functions are found when the driver's library is opened. GNU's linker
# can be told to leave them open, this one cannot: so they are weak, and bound
# when they are first called.
(cd "$root" && go mod download github.com/NVIDIA/go-nvml)
nvml=$(cd "$root" && go list -m -f '{{.Version}} {{.Dir}}' github.com/NVIDIA/go-nvml)
weak=$root/.cache/cross/nvml-${nvml%% *}.h
mkdir -p "$root/.cache/cross"
{
	echo '#pragma GCC system_header'
	grep -oE '\bnvml[A-Z][A-Za-z0-9_]* *\(' "${nvml#* }/pkg/nvml/nvml.h" | tr -d '( ' | sort -u | sed 's/^/#pragma weak /'
} >"$weak.new"
cmp -s "$weak.new" "$weak" || mv "$weak.new" "$weak"
rm -f "$weak.new"

cd "$root"
export CGO_ENABLED=1 GOOS=linux GOARCH=arm64 CC="sh $here/cc.sh" CGO_CFLAGS="-O2 -Wno-deprecated-declarations -include $weak"
go build -trimpath -ldflags="-s -w ${VERSION:+-X github.com/dunlin/dunlin/internal/program.version=$VERSION} -extldflags=-Wl,-z,lazy" -o bin/linux-arm64/dunlin-agent ./cmd/dunlin-agent
