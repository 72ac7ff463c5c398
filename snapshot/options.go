package snapshot

import (
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/blob"
	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
	"github.com/buildkitd-lazy/buildkitd-lazy/store"
)

// Options say where layers come from and who is told of what happens to them.
type Options struct {
	// Hosts returns the hosts that serve ref, with the credentials of the client
	// sessions. Required.
	Hosts func(ref reference.Spec, sessions []string) ([]docker.RegistryHost, error)
	// Door is how readers get into layers: DoorEROFS or DoorFUSE. Required.
	Door string
	// Store and Fill tune what the doors share. What a read has waited for is told to Blob.Fetched.
	Store store.Options
	Fill  fill.SchedulerOptions
	// Prefetch fetches what a layer's maker has put in front of its prefetch landmark as soon as the layer is mounted.
	Prefetch bool
	// Blob tunes ranged reads, and says who is told of them.
	Blob blob.Options
	// Watch says who is told of reads.
	Watch Watch
	// MountTimeout is how long a layer's table of contents may take. 0 means
	// DefaultMountTimeout.
	MountTimeout time.Duration
	// Local, if set, returns where blobs may be that need not be fetched any more.
	Local func() content.Provider
	// Removed, if set, is told when no snapshot has a layer any more, or the Snapshotter is closed. One that isn't mounted for want of room, or since the
	// last process, is still there. It must not wait.
	Removed func(digest.Digest)
}
