#!/usr/bin/env bash
# golangci-lint over every module of the repository that holds code, with the one configuration at its top.
set -euo pipefail
cd "$(dirname "$0")/.."
top=$PWD
status=0
while read -r mod; do
	dir=$(dirname "$mod")
	# A module without Go files (hack/lint, say) pins a tool.
	(cd "$dir" && [[ -n $(go list ./... 2>/dev/null) ]]) || continue
	echo "lint ${dir#./}"
	(cd "$dir" && "$top/bin/tools/golangci-lint" run --config "$top/.golangci.yml" "$@" ./...) || status=1
done < <(git ls-files --cached --others --exclude-standard -- 'go.mod' '*/go.mod' ':!examples')
exit $status
