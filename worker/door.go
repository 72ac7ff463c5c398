package worker

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/snapshots"
	snproxy "github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/dialer"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/containerd/v2/plugins/snapshots/native"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	fuseoverlayfs "github.com/containerd/fuse-overlayfs-snapshotter/v2"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/util/bklog"
	"github.com/moby/buildkit/util/resolver"
	"github.com/moby/buildkit/worker/runc"
	"github.com/pelletier/go-toml/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/buildkitd-lazy/buildkitd-lazy/blob"
	"github.com/buildkitd-lazy/buildkitd-lazy/config"
	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
	"github.com/buildkitd-lazy/buildkitd-lazy/report"
	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
	"github.com/buildkitd-lazy/buildkitd-lazy/store"
)

// Door says how readers get into layers.
type Door struct {
	// Lazy is whether layers are mounted before their bytes are there.
	Lazy bool
	// Name is "erofs" or "fuse" for lazy layers, else the name of the snapshotter.
	Name string
	// Reason says why layers are not lazy, or why this door was chosen.
	Reason string
}

// snapshotterFactory chooses the worker's snapshotter: ours for "auto" and
// "stargz", if this host can mount lazy layers; else what stock buildkitd takes.
func snapshotterFactory(opt Options, rep *report.Reporter) (runc.SnapshotterFactory, Door, error) {
	oci := opt.Config.Workers.OCI
	name := oci.Snapshotter
	if name == "" {
		name = "auto"
	}
	asked := "" // for which no other door will do
	if opt.Lazy.Mount == config.MountEROFS || opt.Lazy.Mount == config.MountFUSE {
		asked = strings.ToUpper(opt.Lazy.Mount)
	}
	if addr := oci.ProxySnapshotterPath; addr != "" {
		if asked != "" {
			return runc.SnapshotterFactory{}, Door{}, fmt.Errorf("lazy mounts by %s are asked for, and a proxy snapshotter, which mounts by itself: leave one of them out", asked)
		}
		f, err := proxySnapshotter(name, addr)
		return f, Door{Name: name, Reason: "a proxy snapshotter is configured"}, err
	}
	if err := os.MkdirAll(opt.Config.Root, 0o700); err != nil {
		return runc.SnapshotterFactory{}, Door{}, fmt.Errorf("state directory: %w", err)
	}
	var reason string
	switch {
	case opt.Lazy.Mount == config.MountOff:
		reason = `lazy mounts are "off" in the configuration`
	case name != "auto" && name != snapshot.Name && asked != "":
		return runc.SnapshotterFactory{}, Door{}, fmt.Errorf("lazy mounts by %s are asked for, and the snapshotter %q, which has none: leave one of them out", asked, name)
	case name != "auto" && name != snapshot.Name:
		reason = fmt.Sprintf("the snapshotter %q is configured", name)
	default:
		door, why, err := lazyDoor(opt.Config.Root, opt.Lazy.Mount)
		if err == nil {
			f, err := lazySnapshotter(opt, rep, door)
			return f, Door{Lazy: true, Name: door, Reason: why}, err
		}
		if asked != "" {
			return runc.SnapshotterFactory{}, Door{}, fmt.Errorf("lazy mounts by %s are asked for: %w", asked, err)
		}
		reason = err.Error()
	}
	if name == "auto" || name == snapshot.Name {
		name = stockSnapshotter(opt.Config.Root)
	}
	f, err := eagerSnapshotter(name)
	return f, Door{Name: name, Reason: reason}, err
}

// lazyDoor returns the best door that serves layers below root, among those that mount allows, and why it's that one.
func lazyDoor(root, mount string) (door, why string, err error) {
	var erofs, fuse error
	if mount != config.MountFUSE {
		if erofs = snapshot.Supported(root, snapshot.DoorEROFS); erofs == nil {
			return snapshot.DoorEROFS, "EROFS with pre-content events works here", nil
		}
	}
	if mount != config.MountEROFS {
		if fuse = snapshot.Supported(root, snapshot.DoorFUSE); fuse == nil {
			why = "FUSE works here"
			if erofs != nil {
				why += ", and the kernel can't serve layers: " + erofs.Error()
			}
			return snapshot.DoorFUSE, why, nil
		}
	}
	switch {
	case erofs == nil:
		err = fuse
	case fuse == nil || fuse.Error() == erofs.Error():
		err = erofs
	default:
		err = fmt.Errorf("neither EROFS (%w) nor FUSE (%w) can serve layers", erofs, fuse)
	}
	return "", "", err
}

func lazySnapshotter(opt Options, rep *report.Reporter, door string) (runc.SnapshotterFactory, error) {
	tuned, err := stargzTuning(opt.Config.Workers.OCI.StargzSnapshotterConfig)
	if err != nil {
		return runc.SnapshotterFactory{}, err
	}
	sopt := snapshot.Options{
		Hosts:        opt.hosts,
		Door:         door,
		Store:        store.Options{MaxSize: opt.Lazy.MaxSize, Notice: noticeStore},
		Fill:         fill.SchedulerOptions{Background: opt.Lazy.BackgroundFetch && !tuned.NoBackgroundFetch, Busy: rep.Running},
		Prefetch:     opt.Lazy.Prefetch && !tuned.NoPrefetch,
		Blob:         blobOptions(opt, rep),
		Watch:        opt.watch,
		MountTimeout: opt.Lazy.MountTimeout,
		Removed:      rep.Forget,
		Local:        opt.local,
	}
	return runc.SnapshotterFactory{
		Name: snapshot.Name,
		New: func(root string) (snapshots.Snapshotter, error) {
			s, err := snapshot.New(root, sopt)
			if err != nil {
				return nil, err // without a typed nil
			}
			return s, nil
		},
	}, nil
}

// readHosts returns who serves a repository to those who read ranges, with the credentials of sessions, or what is left of them.
func readHosts(opt Options, hosts docker.RegistryHosts, passwords *passwords) func(ref reference.Spec, sessions []string) ([]docker.RegistryHost, error) {
	pool, ended := newClients(opt.Config.Registries), newEndedSessions()
	return func(ref reference.Spec, sessions []string) ([]docker.RegistryHost, error) {
		of := func(sessions ...string) ([]docker.RegistryHost, error) {
			return resolver.DefaultPool.GetResolver(hosts, ref.String(), resolver.ScopeType{},
				opt.SessionManager, session.NewGroup(sessions...)).HostsFunc(ref.Hostname())
		}
		if those := alive(opt.SessionManager, sessions); len(those) > 0 {
			found, err := of(those...)
			pool.use(found)
			for i := range found {
				h := &found[i]
				h.Authorizer = learningAuthorizer{h.Authorizer, func() {
					for _, id := range those {
						passwords.learn(h.Host, id)
					}
				}}
			}
			return found, err
		}
		found, err := of(sessions...)
		if err == nil && len(sessions) > 0 {
			var nobodys []docker.RegistryHost
			if nobodys, err = of(); err == nil {
				for i := range found {
					theirs := found[i].Authorizer
					if by := passwords.authorizer(found[i], sessions); by != nil {
						theirs = by
					}
					found[i].Authorizer = ended.authorizer(found[i].Host, ref.Locator, sessions, theirs, nobodys[i].Authorizer)
				}
			}
		}
		pool.use(found)
		return found, err
	}
}

func blobOptions(opt Options, rep *report.Reporter) blob.Options {
	return blob.Options{RetryFor: opt.Lazy.FetchTimeout, Fetched: rep.Fetched}
}

// noticeStore logs what the store of lazy layers has mended, or could not do in the background.
func noticeStore(key store.Key, err error) {
	l := bklog.L.WithError(err)
	if key.Blob != "" {
		l = l.WithField("layer", key.Blob)
	}
	l.Warn("store of lazy layers")
}

// tuning is what the lazy layers take from [worker.oci.stargzSnapshotter], whose other keys tune
// stargz-snapshotter's own file system.
type tuning struct {
	NoPrefetch        bool `toml:"noprefetch"`
	NoBackgroundFetch bool `toml:"no_background_fetch"`
}

func stargzTuning(raw map[string]any) (t tuning, err error) {
	if len(raw) == 0 {
		return t, nil
	}
	dt, err := toml.Marshal(raw)
	if err == nil {
		err = toml.Unmarshal(dt, &t)
	}
	if err != nil {
		return t, fmt.Errorf("[worker.oci.stargzSnapshotter]: %w", err)
	}
	var idle []string
	for key := range raw {
		if key != "noprefetch" && key != "no_background_fetch" {
			idle = append(idle, key)
		}
	}
	if len(idle) > 0 {
		slices.Sort(idle)
		bklog.L.Warnf("[worker.oci.stargzSnapshotter] %s: without effect, as layers are not served by stargz-snapshotter's file system; see [lazy]",
			strings.Join(idle, ", "))
	}
	return t, nil
}

// stockSnapshotter is what stock buildkitd takes for "auto".
func stockSnapshotter(root string) string {
	err := overlayutils.Supported(root)
	if err == nil {
		return "overlayfs"
	}
	bklog.L.WithError(err).Debug("auto snapshotter: no overlayfs")
	if err = fuseoverlayfs.Supported(root); err == nil {
		return "fuse-overlayfs"
	}
	bklog.L.WithError(err).Debug("auto snapshotter: no fuse-overlayfs")
	return "native"
}

func eagerSnapshotter(name string) (runc.SnapshotterFactory, error) {
	f := runc.SnapshotterFactory{Name: name}
	switch name {
	case "native":
		f.New = native.NewSnapshotter
	case "overlayfs":
		f.New = func(root string) (snapshots.Snapshotter, error) {
			return overlay.NewSnapshotter(root, overlay.AsynchronousRemove)
		}
	case "fuse-overlayfs":
		f.New = func(root string) (snapshots.Snapshotter, error) {
			return fuseoverlayfs.NewSnapshotter(root)
		}
	default:
		return f, fmt.Errorf("unknown snapshotter %q: use auto, stargz, overlayfs, fuse-overlayfs or native", name)
	}
	open := f.New
	f.New = func(root string) (snapshots.Snapshotter, error) {
		if err := snapshot.SetAside(context.Background(), root); err != nil {
			return nil, err
		}
		return open(root)
	}
	return f, nil
}

func proxySnapshotter(name, addr string) (runc.SnapshotterFactory, error) {
	f := runc.SnapshotterFactory{Name: name}
	if _, err := os.Stat(addr); err != nil {
		return f, fmt.Errorf("proxy snapshotter (its socket's path, without unix://): %w", err)
	}
	f.New = func(string) (snapshots.Snapshotter, error) {
		bo := backoff.DefaultConfig
		bo.MaxDelay = 3 * time.Second
		conn, err := grpc.NewClient("passthrough:///"+dialer.DialAddress(addr),
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithConnectParams(grpc.ConnectParams{Backoff: bo}),
			grpc.WithContextDialer(dialer.ContextDialer),
			grpc.WithDefaultCallOptions(
				grpc.MaxCallRecvMsgSize(defaults.DefaultMaxRecvMsgSize),
				grpc.MaxCallSendMsgSize(defaults.DefaultMaxSendMsgSize)),
		)
		if err != nil {
			return nil, fmt.Errorf("proxy snapshotter %s: %w", addr, err)
		}
		return snproxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), name), nil
	}
	return f, nil
}
