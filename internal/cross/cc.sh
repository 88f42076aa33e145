#!/bin/sh
# A C compiler for linux/arm64 and glibc 2.31: Zig's, less the option that its
# linker does not know and build.sh stands in for.
set -eu

zig=$(cd "$(dirname "$0")/../.." && pwd)/.cache/zig/ziglang/zig
n=$#
while [ "$n" -gt 0 ]; do
	case $1 in
	-Wl,--unresolved-symbols=*) ;;
	*) set -- "$@" "$1" ;;
	esac
	shift
	n=$((n - 1))
done
exec "$zig" cc -target aarch64-linux-gnu.2.31 "$@"
