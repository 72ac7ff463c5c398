#!/usr/bin/env bash
# Runs every fuzz target of the product for a while: hack/fuzz.sh 10s.
set -euo pipefail
cd "$(dirname "$0")/.."

duration=${1:-10s}
found=
for dir in $(git grep --untracked -l '^func Fuzz' -- '*_test.go' ':!integration' | xargs -r -n1 dirname | sed 's|^|./|' | sort -u); do
	for target in $(grep -ho '^func Fuzz[A-Za-z0-9_]*' "$dir"/*_test.go | cut -d' ' -f2 | sort -u); do
		found=1
		echo "$dir $target"
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$duration" "$dir"
	done
done
if [[ -z $found ]]; then
	echo "fuzz: no fuzz targets found" >&2
	exit 1
fi
