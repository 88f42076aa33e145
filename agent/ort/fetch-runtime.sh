#!/bin/sh
# Fetches the ONNX Runtime shared library and prints its path on stdout.
# DUNLIN_ORT_LIB names a library of your own instead. Otherwise the pinned
# version lies in .cache/onnxruntime, from the first way that works: npm, pip,
# or the release archive. What arrives is checked by SHA-256 before it is used.
# With "arm64" it fetches that of linux/arm64, for tests of programs that were
# built for it elsewhere.
# shellcheck disable=SC2317 # the from_ functions are called by name
set -eu

version=1.30.0
root=$(cd "$(dirname "$0")/../.." && pwd)
cache=$root/.cache/onnxruntime${1:+/$1}
lib=$cache/libonnxruntime.so.$version

say() { echo "runtime: $*" >&2; }
die() { say "$*"; exit 1; }

if [ -z "${1:-}" ] && [ -n "${DUNLIN_ORT_LIB:-}" ]; then
	[ -f "$DUNLIN_ORT_LIB" ] || die "DUNLIN_ORT_LIB=$DUNLIN_ORT_LIB is not a file"
	echo "$(cd "$(dirname "$DUNLIN_ORT_LIB")" && pwd)/$(basename "$DUNLIN_ORT_LIB")"
	exit
fi

machine=$(uname -sm)
[ -z "${1:-}" ] || machine="Linux $1"
case $machine in
"Linux x86_64")
	npm_arch=x64 pip_arch=x86_64 release_arch=x64
	npm_sha=ffb75a925ba05e47b235bb66e3e3911714a80b328a9c9425539feb204aa32a23
	pip_sha=c902c70b3003c0e99fada202f37478c515ae9bba7944c2b2abd0017bae0c82ed
	release_sha=a5ed5a3cac51fbb2e90da632ae43d19212faaa20e76484e62bcb7c23ddb3b3fd
	;;
"Linux aarch64" | "Linux arm64")
	npm_arch=arm64 pip_arch=aarch64 release_arch=aarch64
	npm_sha=1f549d46250b005580b597f4164984aaf75b3bcb9f3aeb07c7f8a8fe60b23c76
	pip_sha=8a218e1e446880131115c368ec7005969a5022af9a15a26173de648fef0b7789
	release_sha=e16a27a8ed330bbc698df7330b0cf56e722f354e3bcc92118682c74ef3c3e3da
	;;
*)
	die "no pinned library for $machine: set DUNLIN_ORT_LIB to ONNX Runtime $version"
	;;
esac

if command -v sha256sum >/dev/null; then
	sha() { sha256sum "$1" | cut -d ' ' -f 1; }
elif command -v shasum >/dev/null; then
	sha() { shasum -a 256 "$1" | cut -d ' ' -f 1; }
else
	die "needs sha256sum or shasum"
fi

# The release archive is pinned as a whole, so the digest of a library that came
# out of it is kept beside the library.
if [ -f "$lib" ]; then
	have=$(sha "$lib")
	case $have in
	"$npm_sha" | "$pip_sha" | "$(cat "$lib.sha256" 2>/dev/null || true)")
		echo "$lib"
		exit
		;;
	esac
	say "cached library has SHA-256 $have, not a pinned one: fetching it again"
fi

mkdir -p "$cache"
tmp=$(mktemp -d "$cache/fetch.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM

# check FILE SHA256
check() {
	have=$(sha "$1") || return
	[ "$have" = "$2" ] || { echo "error: $(basename "$1") has SHA-256 $have, want $2"; return 1; }
}

# keep LIBRARY puts a checked library into the cache.
keep() { chmod 644 "$1" && mv -f "$1" "$lib"; }

from_npm() {
	command -v npm >/dev/null || { echo "not installed"; return 1; }
	npm pack --ignore-scripts --fetch-retries=1 "onnxruntime-node@$version" || return
	member=package/bin/napi-v6/linux/$npm_arch/libonnxruntime.so.1
	tar -xzf "onnxruntime-node-$version.tgz" "$member" || return
	check "$member" "$npm_sha" && keep "$member"
}

from_pip() {
	if python3 -m pip --version >/dev/null 2>&1; then
		pip="python3 -m pip"
	elif command -v pip3 >/dev/null; then
		pip=pip3
	elif command -v pip >/dev/null; then
		pip=pip
	else
		echo "not installed"
		return 1
	fi
	$pip download --disable-pip-version-check --retries 1 --no-deps --only-binary=:all: \
		--python-version 3.12 --implementation cp --abi cp312 \
		--platform "manylinux_2_28_$pip_arch" --dest wheel "onnxruntime==$version" || return
	member=onnxruntime/capi/libonnxruntime.so.$version
	if command -v unzip >/dev/null; then
		unzip -q wheel/*.whl "$member" || return
	else
		python3 -m zipfile -e wheel/*.whl . || return
	fi
	check "$member" "$pip_sha" && keep "$member"
}

from_release() {
	command -v curl >/dev/null || { echo "curl is not installed"; return 1; }
	name=onnxruntime-linux-$release_arch-$version
	curl -fsSL --connect-timeout 15 --retry 1 -o "$name.tgz" \
		"https://github.com/microsoft/onnxruntime/releases/download/v$version/$name.tgz" || return
	check "$name.tgz" "$release_sha" || return
	tar -xzf "$name.tgz" "$name/lib/libonnxruntime.so.$version" || return
	sha "$name/lib/libonnxruntime.so.$version" >"$lib.sha256" || return
	keep "$name/lib/libonnxruntime.so.$version"
}

for way in npm pip release; do
	say "fetching ONNX Runtime $version ($way)"
	if (cd "$tmp" && "from_$way") >"$tmp/$way.log" 2>&1; then
		say "checked and kept as $lib"
		echo "$lib"
		exit
	fi
	reason=$(grep -E -m 1 '^(npm )?(error|ERR)' "$tmp/$way.log" || tail -n 1 "$tmp/$way.log")
	say "$way failed: $reason"
done
die "no way to fetch ONNX Runtime $version worked (npm, pip, release archive): install npm, pip or curl with access to their servers, or set DUNLIN_ORT_LIB to the library's path"
