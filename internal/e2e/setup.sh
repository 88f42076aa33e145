#!/bin/sh
# Sets up what the tests need beyond Go: a C compiler, the MQTT broker
# Mosquitto, the simulated TPM swtpm, the browser Chromium, Python, and clients for it; on other machines than arm64, QEMU's
# emulation of a program of it, and the libraries that such a program needs. Installs missing Debian packages when
# it may, else lists what to do.
set -eu

clients() { exec sh "$(dirname "$0")/clients/setup.sh"; }

missing() {
	command -v "$(go env CC)" >/dev/null || echo gcc libc6-dev
	command -v mosquitto >/dev/null || [ -x /usr/sbin/mosquitto ] || echo mosquitto
	command -v swtpm >/dev/null || echo swtpm
	command -v chromium >/dev/null || echo chromium
	command -v python3 >/dev/null || echo python3 python3-venv
	case $(uname -m) in aarch64 | arm64) return ;; esac
	command -v qemu-aarch64 >/dev/null || echo qemu-user
	[ -f /usr/aarch64-linux-gnu/lib/libstdc++.so.6 ] || echo libc6-arm64-cross libstdc++6-arm64-cross libgcc-s1-arm64-cross
}

command -v go >/dev/null || { echo "setup: Go is missing: https://go.dev/dl" >&2; exit 1; }

need=$(missing | xargs)
[ -n "$need" ] || clients

if ! command -v apt-get >/dev/null; then
	as=
	why="there is no apt-get here"
elif [ "$(id -u)" = 0 ]; then
	as="env"
elif sudo -n true 2>/dev/null; then
	as="sudo -n env"
else
	as=
	why="not root, and no sudo without a password"
fi

if [ -n "$as" ]; then
	echo "setup: installing $need" >&2
	apt="$as DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0"
	# A fresh container has no package lists yet.
	# shellcheck disable=SC2086 # both are lists of words
	if ! $apt install -y --no-install-recommends $need >/dev/null 2>&1; then
		{ $apt update && $apt install -y --no-install-recommends $need; } >&2 || why="apt-get failed"
	fi
	need=$(missing | xargs)
	[ -n "$need" ] || clients
fi

cat >&2 <<END
setup: the tests need Debian packages that are missing: $need
setup: not installed: ${why:-apt-get did not bring them}
setup: install them and run this again, for example: sudo apt-get install $need
END
exit 1
