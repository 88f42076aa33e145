#!/bin/sh
# Installs MLServer and onnxruntime, at pinned versions, into a virtual
# environment in .cache/mlserver and prints the path of the program on stdout.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
venv=$(cd "$here/../../.." && pwd)/.cache/mlserver

if ! cmp -s "$here/requirements.txt" "$venv/installed"; then
	rm -rf "$venv"
	python3 -m venv "$venv" >&2
	"$venv/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt" >&2
	cp "$here/requirements.txt" "$venv/installed"
fi
echo "$venv/bin/mlserver"
