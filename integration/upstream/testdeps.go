//go:build testdeps

package main

// What the tests and tools that this command compiles import. None of it is
// linked into the command: the build tag keeps the list for go mod tidy, so
// that "go test -c" of BuildKit's packages and "go build" of the registry
// resolve against this module's go.sum, offline.
import (
	_ "github.com/containerd/containerd/v2/client"
	_ "github.com/containerd/continuity"
	_ "github.com/containerd/continuity/fs/fstest"
	_ "github.com/containerd/nydus-snapshotter/pkg/converter"
	_ "github.com/containernetworking/plugins/plugins/ipam/host-local"
	_ "github.com/containernetworking/plugins/plugins/main/bridge"
	_ "github.com/containernetworking/plugins/plugins/main/loopback"
	_ "github.com/containernetworking/plugins/plugins/meta/firewall"
	_ "github.com/distribution/distribution/v3/cmd/registry"
	_ "github.com/google/go-cmp/cmp"
	_ "github.com/moby/buildkit/client"
	_ "github.com/moby/buildkit/cmd/buildctl"
	_ "github.com/moby/buildkit/cmd/buildkitd"
	_ "github.com/moby/buildkit/frontend/dockerfile"
	_ "github.com/moby/buildkit/util/pgpsign"
	_ "github.com/moby/buildkit/util/testutil"
	_ "github.com/moby/buildkit/util/testutil/containerd"
	_ "github.com/moby/buildkit/util/testutil/echoserver"
	_ "github.com/moby/buildkit/util/testutil/helpers"
	_ "github.com/moby/buildkit/util/testutil/httpserver"
	_ "github.com/moby/buildkit/util/testutil/integration"
	_ "github.com/moby/buildkit/util/testutil/workers"
	_ "github.com/stretchr/testify/assert"
	_ "github.com/stretchr/testify/require"
)
