#!/bin/sh
# Builds the Debian packages dunlin-agent, dunlin-controller and dunlin into the
# folder that is named, else bin/deb. ARCH is amd64 or arm64, this machine's
# without it; VERSION the version that they are built as, else the one that the
# source is of. Exits with 3 where nfpm, which writes them, cannot be fetched.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
mkdir -p "${1:-$root/bin/deb}"
out=$(cd "${1:-$root/bin/deb}" && pwd)
cd "$root"

say() { echo "deb: $*" >&2; }
die() { say "$*"; exit 1; }
nfpm() { go run github.com/goreleaser/nfpm/v2/cmd/nfpm@v2.43.0 "$@"; }

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
nfpm --version >"$tmp/log" 2>&1 || { cat "$tmp/log" >&2; say "cannot fetch nfpm"; exit 3; }

machine=$(go env GOARCH)
arch=${ARCH:-$machine}
version=${VERSION:-$(sed -n 's/^var version = "\(.*\)"$/\1/p' internal/program/version.go)}
[ "$(go env GOOS)" = linux ] || die "Debian packages are built on Linux"

set -- -trimpath -ldflags="-s -w -X github.com/dunlin/dunlin/internal/program.version=$version"
CGO_ENABLED=0 GOARCH=$arch go build "$@" -o "$tmp/" ./cmd/dunlin ./cmd/dunlin-controller
if [ "$arch" = "$machine" ]; then
	CGO_ENABLED=1 CGO_CFLAGS="-O2 -g -Wno-deprecated-declarations" go build "$@" -o "$tmp/" ./cmd/dunlin-agent
	runtime=$(sh agent/ort/fetch-runtime.sh)
elif [ "$arch" = arm64 ]; then
	VERSION=$version sh internal/cross/build.sh
	cp bin/linux-arm64/dunlin-agent "$tmp/"
	runtime=$(sh agent/ort/fetch-runtime.sh arm64)
else
	die "packages for $arch cannot be built on $machine"
fi
cp "$runtime" "$tmp/libonnxruntime.so.1"
chmod 644 "$tmp/libonnxruntime.so.1"

# The newest libc that the agent or its runtime asks for.
libc=$(cat "$tmp/dunlin-agent" "$tmp/libonnxruntime.so.1" | grep -aoE 'GLIBC_2\.[0-9]+' | sort -uV | tail -n 1)
[ -n "$libc" ] || die "the agent does not say which libc it needs"

# fill FILE AS copies one with what is known now.
fill() {
	sed -e "s|@NAME@|$name|g" -e "s|@ARCH@|$arch|g" -e "s|@VERSION@|$version|g" -e "s|@LIBC@|${libc#GLIBC_}|g" -e "s|@BUILT@|$tmp|g" "$1" >"$2"
}

SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH

# Of this machine's make, whatever the packages are for.
go run ./cmd/dunlin man "$tmp/man"
gzip -9n "$tmp"/man/*.1

for name in dunlin-agent dunlin-controller dunlin; do
	for script in postinst prerm postrm; do
		fill "$here/$script" "$tmp/$script"
	done
	fill "$here/$name.yaml" "$tmp/nfpm.yaml"
	nfpm package --config "$tmp/nfpm.yaml" --packager deb --target "$out/${name}_${version}_$arch.deb" >"$tmp/log" 2>&1 || { cat "$tmp/log" >&2; exit 1; }
	echo "$out/${name}_${version}_$arch.deb"
done
