package main

import (
	"fmt"
	"runtime/debug"
	"strings"

	bkversion "github.com/moby/buildkit/version"
)

// Set by the linker: -ldflags "-X main.version=v1.2.3 -X main.revision=<commit>".
var (
	version  = "v0.1.0"
	revision = ""
)

const (
	productPackage  = "github.com/buildkitd-lazy/buildkitd-lazy"
	buildkitPackage = "github.com/moby/buildkit"
)

// reportBuildKitVersion makes BuildKit's own version variable, which is the linker's to fill in upstream, say which
// BuildKit is linked here. The Info and ListWorkers calls, the user agent and provenance report it, and clients
// decide by it what the daemon can do: it has to be BuildKit's version and not ours, and without a suffix, because
// BuildKit takes itself for a development build where there is one.
func reportBuildKitVersion() {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return
	}
	for _, dep := range info.Deps {
		if dep.Path == buildkitPackage {
			bkversion.Version = dep.Version
		}
	}
}

// cliVersion is the third field of --version. buildx's docker-container driver takes that field for BuildKit's
// version (of a daemon that has no Info call), so BuildKit's it is; our own follows as build metadata, which by
// semver's rules no comparison looks at: v0.33.1+lazy.0.1.0.
func cliVersion() string {
	sep := "+"
	if strings.Contains(bkversion.Version, "+") {
		sep = "."
	}
	return bkversion.Version + sep + "lazy." + strings.TrimPrefix(version, "v")
}

// versionLine has exactly four fields: buildx refuses anything else.
func versionLine() string {
	return fmt.Sprintf("buildkitd-lazy %s %s %s", productPackage, cliVersion(), sourceRevision())
}

// sourceRevision is the commit this binary was built from, "unknown" where neither the linker nor the toolchain was
// told.
func sourceRevision() string {
	if revision != "" {
		return revision
	}
	rev, dirty := "", false
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			switch s.Key {
			case "vcs.revision":
				rev = s.Value
			case "vcs.modified":
				dirty = s.Value == "true"
			}
		}
	}
	switch {
	case rev == "":
		return "unknown"
	case dirty:
		return rev + ".m"
	}
	return rev
}
