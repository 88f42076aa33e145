#!/bin/sh
# Makes a virtual environment with the reference implementation of OpenSSF
# Model Signing in .cache/model-signing, and prints its path. Exits with 75
# where the Python Package Index cannot be reached.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
dir=$(cd "$here/../.." && pwd)/.cache/model-signing
log=$dir.log

want=$({ cat "$here/requirements.txt" "$0"; python3 -VV; echo "$dir"; } | cksum)
if [ "$(cat "$dir/stamp" 2>/dev/null || true)" != "$want" ]; then
	mkdir -p "$(dirname "$dir")"
	rm -rf "$dir"
	python3 -m venv "$dir" >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
	"$dir/bin/python" -m pip install --disable-pip-version-check --retries 1 -q --no-deps -r "$here/requirements.txt" >"$log" 2>&1 || {
		cat "$log" >&2
		grep -qE 'ConnectionError|NewConnectionError|Temporary failure in name resolution|No matching distribution|timed out' "$log" && exit 75
		exit 1
	}
	echo "$want" >"$dir/stamp"
fi
echo "$dir"
