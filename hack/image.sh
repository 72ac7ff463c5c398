#!/usr/bin/env bash
# Builds the driver image with our own daemon, from nothing but this machine's files and
# bin/: no registry is asked for anything. Writes two tars to bin/image:
#
#   docker.tar  for `docker load`, tagged $IMAGE
#   oci.tar     the same as an OCI layout, for `skopeo`, `crane` and the like to push
#
# Layers are eStargz, which is gzip to whoever does not know better.
#
# Usage: hack/image.sh [name:tag]      (default buildkitd-lazy:latest, or $IMAGE)
set -euo pipefail
cd "$(dirname "$0")/.."

image=${1:-${IMAGE:-buildkitd-lazy:latest}}
daemon=$PWD/bin/buildkitd-lazy
buildctl=$PWD/bin/tools/buildctl
out=$PWD/bin/image

for f in "$daemon" "$buildctl"; do
	[ -x "$f" ] || { echo "image: $f is missing: run make build tools" >&2; exit 1; }
done
[ "$(id -u)" = 0 ] || { echo "image: this starts buildkitd-lazy, which needs root here: use sudo make image" >&2; exit 1; }
hack/deps.sh image

work=$(mktemp -d)
pid=
cleanup() {
	if [ -n "$pid" ]; then
		kill "$pid" 2>/dev/null || true
		wait "$pid" 2>/dev/null || true
	fi
	rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# runc is C and Go. Linked statically it runs on the image's busybox; with seccomp, because
# BuildKit puts a profile in every container it starts.
echo "image: building runc" >&2
mkdir -p bin/image
(cd image/runc && CGO_ENABLED=1 go build -o "$out/runc" \
	-tags 'seccomp apparmor netgo cgo static_build osusergo' \
	-ldflags '-s -w -extldflags -static' github.com/opencontainers/runc)

ctx=$work/context
base=$ctx/base
install -D -m 0755 "$daemon" "$ctx/bin/buildkitd"
install -D -m 0755 "$buildctl" "$ctx/bin/buildctl"
install -D -m 0755 "$out/runc" "$ctx/bin/runc"
strip "$ctx/bin/buildkitd" "$ctx/bin/buildctl"

install -D -m 0755 "$(command -v busybox)" "$base/bin/busybox"
install -D -m 0644 /etc/ssl/certs/ca-certificates.crt "$base/etc/ssl/certs/ca-certificates.crt"
echo 'root:x:0:0:root:/root:/bin/sh' >"$base/etc/passwd"
echo 'root:x:0:' >"$base/etc/group"

# git is this machine's own with the shared libraries that it names: enough for git contexts
# over https and for submodules.
core=$(git --exec-path)
git_files=("$core/git-remote-http" "$core/git-submodule" "$core/git-sh-setup" "$core/git-sh-i18n")
install -D -m 0755 "$(command -v git)" "$base/usr/bin/git"
for f in "${git_files[@]}"; do
	[ -e "$f" ] && install -D -m 0755 "$f" "$base/usr/lib/git-core/$(basename "$f")"
done
ln -s git-remote-http "$base/usr/lib/git-core/git-remote-https"
mkdir -p "$base/usr/share/git-core/templates"
for lib in $(ldd "$(command -v git)" "$core/git-remote-http" | grep -o '/[^ )]*\.so[^ )]*' | sort -u); do
	install -D -m 0755 "$lib" "$base$lib"
done

echo "image: building $image with buildkitd-lazy" >&2
"$daemon" --root "$work/state" --addr "unix://$work/buildkitd.sock" >"$work/log" 2>&1 &
pid=$!
for _ in $(seq 150); do
	"$buildctl" --addr "unix://$work/buildkitd.sock" debug workers >/dev/null 2>&1 && break
	kill -0 "$pid" 2>/dev/null || { cat "$work/log" >&2; echo "image: buildkitd-lazy did not start: its log is above" >&2; exit 1; }
	sleep 0.2
done

build() {
	"$buildctl" --addr "unix://$work/buildkitd.sock" build --frontend dockerfile.v0 \
		--local context="$ctx" --local dockerfile=image "$@" \
		|| { tail -n 50 "$work/log" >&2; echo "image: the build failed: the daemon's last words are above" >&2; exit 1; }
}
build --opt target=check
build --opt target=image \
	--output "type=docker,name=$image,compression=estargz,force-compression=true,dest=$out/docker.tar" \
	--output "type=oci,name=$image,compression=estargz,force-compression=true,dest=$out/oci.tar"

rm -f "$out/runc"
chmod 0644 "$out"/*.tar
ls -lh "$out" >&2
echo "image: load it with docker load -i bin/image/docker.tar, then" >&2
echo "image: docker buildx create --use --driver docker-container --driver-opt image=$image" >&2
