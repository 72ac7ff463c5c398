#!/bin/sh
# Makes a builder of the buildx kubernetes driver out of our image, in the cluster and
# namespace that kubectl points at.
#
# Usage: create-builder.sh IMAGE [NAMESPACE]
set -eu
image=${1:?usage: create-builder.sh IMAGE [NAMESPACE]}
namespace=${2:-buildkit}

docker buildx create --use --bootstrap --name lazy --driver kubernetes \
	--buildkitd-config "$(dirname "$0")/buildkitd.toml" \
	--driver-opt "image=$image,namespace=$namespace,replicas=2,loadbalance=sticky" \
	--driver-opt "requests.cpu=1,requests.memory=2Gi"
