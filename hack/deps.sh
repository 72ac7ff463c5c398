#!/usr/bin/env bash
# Installs by apt-get what a job needs and this machine lacks: hack/deps.sh test|image|demo|bench.
# Says what and why. Does nothing, and is quiet, where nothing is missing.
set -euo pipefail

job=${1:-test}
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# job(s), command or path, Debian package, why.
table='
test,image,demo,bench  git           git              versions, and builds from git repositories
test,image,demo,bench  runc          runc             runs build steps
test,demo,bench        fusermount3   fuse3            the FUSE mounts of lazy layers
test,image,demo,bench  static:busybox busybox-static  the shell of test and demo base images
test,demo,bench        ip            iproute2         network namespaces and links for tests and measurements
test,demo,bench        tc            iproute2         bandwidth of the measured link
test                   setfattr      attr             layers with extended attributes
test                   setcap        libcap2-bin      layers with file capabilities
test                   mkfs.ext4     e2fsprogs        a small disk to fill
test                   fsck.erofs    erofs-utils      checks the EROFS images that we write
test                   zstd          zstd             decompresses the frames that we write
test,image             gcc           gcc              builds the race detector and the runc of the image
test,image             /usr/include/stdio.h libc6-dev what they link against
test,image             pkg-config    pkg-config       finds libseccomp for the runc of the image
test,image             /usr/include/seccomp.h libseccomp-dev  the runc of the image filters system calls
test                   dockerd       docker.io        a real Docker Engine for the docker-container driver
test                   rootlesskit   rootlesskit      a daemon of an ordinary user
test                   newuidmap     uidmap           the same: its subordinate ids
test                   iptables      iptables         the network of that Docker Engine
test,image,demo,bench  /etc/ssl/certs/ca-certificates.crt ca-certificates  TLS to registries and module proxies
test,bench             debootstrap   debootstrap      the Debian development images
'

present() {
	case $1 in
	/*) [[ -e $1 ]] ;;
	static:*) command -v "${1#static:}" >/dev/null && ! ldd "$(command -v "${1#static:}")" >/dev/null 2>&1 ;;
	*) command -v "$1" >/dev/null ;;
	esac
}

packages=() reasons=()
while read -r jobs what package why; do
	[[ ,$jobs, == *,$job,* ]] || continue
	present "$what" && continue
	[[ " ${packages[*]-} " == *" $package "* ]] && continue
	packages+=("$package")
	reasons+=("$(printf '  %-16s %s' "$package" "$why")")
done < <(sed '/^$/d' <<<"$table")

if ! command -v go >/dev/null; then
	echo "deps: go is not on PATH: install Go $(sed -n 's/^go //p' "$(dirname "$0")/../go.mod") or newer from https://go.dev/dl" >&2
	exit 1
fi
[[ ${#packages[@]} -gt 0 ]] || exit 0

if ! command -v apt-get >/dev/null; then
	echo "deps: missing here, and there is no apt-get to install it with:" >&2
	printf '%s\n' "${reasons[@]}" >&2
	exit 1
fi
if [[ $EUID -ne 0 ]]; then
	echo "deps: missing here, and only root can install it: sudo apt-get install ${packages[*]}" >&2
	printf '%s\n' "${reasons[@]}" >&2
	exit 1
fi

echo "deps: installing"
printf '%s\n' "${reasons[@]}"

# A service that a package brings (docker.io) is for the tests to start, not for the installation.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
	trap 'rm -f "$policy"' EXIT
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod 0755 "$policy"
fi

log=$(mktemp)
apt() {
	if ! DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=120 "$@" >"$log" 2>&1 </dev/null; then
		return 1
	fi
}
install() { apt install --no-install-recommends "${packages[@]}"; }

updated=
if ! compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null; then
	echo "deps: apt-get update, as there are no package lists"
	apt update || { cat "$log" >&2; exit 1; }
	updated=1
fi
if ! install; then
	# Old lists name package versions that the archive has dropped.
	if [[ -n $updated ]]; then
		cat "$log" >&2
		exit 1
	fi
	echo "deps: apt-get update, as that failed with the package lists at hand"
	apt update || { cat "$log" >&2; exit 1; }
	install || { cat "$log" >&2; exit 1; }
fi
rm -f "$log"
