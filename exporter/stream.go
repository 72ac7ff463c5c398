package exporter

import (
	"context"
	"maps"
	"net/url"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/labels"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/buildkit/cache"
	bkexporter "github.com/moby/buildkit/exporter"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/util/bklog"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// Blobs provides the blobs of lazy layers from where they are.
type Blobs interface {
	// Stream reads a blob, and keeps nothing of it. One that is in the content store, or of which nobody knows where it is, is
	// ErrNotFound of containerd's.
	Stream(ctx context.Context, desc ocispecs.Descriptor, g session.Group) (content.ReaderAt, error)
	// Repositories are those that the blob has been pushed to, e.g. "registry.example/team/app".
	Repositories(dgst digest.Digest) []string
	// Pushed says that a repository has the layers of a ref.
	Pushed(ctx context.Context, ref cache.ImmutableRef, repository string) error
}

// streaming provides blobs to who sends them elsewhere, having asked there for them: BuildKit's own provider puts the blob of a lazy layer into
// the content store in order to read it.
type streaming struct {
	content.InfoReaderProvider
	blobs   Blobs
	session session.Group
	only    func() bool // asked for each blob, if there is one
}

// ReaderAt implements content.Provider.
func (p *streaming) ReaderAt(ctx context.Context, desc ocispecs.Descriptor) (content.ReaderAt, error) {
	if p.only != nil && !p.only() {
		return p.InfoReaderProvider.ReaderAt(ctx, desc)
	}
	r, err := p.blobs.Stream(ctx, desc, p.session)
	if cerrdefs.IsNotFound(err) {
		return p.InfoReaderProvider.ReaderAt(ctx, desc)
	}
	return r, err
}

// ToCache has the lazy layers of remotes passed on to the cache that the build of a session exports, if nobody else wants them.
func ToCache(remotes []*solver.Remote, blobs Blobs, g session.Group) []*solver.Remote {
	only := func() bool {
		return slices.ContainsFunc(session.AllSessionIDs(g), func(id string) bool { return wanted.alone(id, aCache) })
	}
	remotes = slices.Clone(remotes)
	for i, r := range remotes {
		remotes[i] = &solver.Remote{Descriptors: r.Descriptors, Provider: &streaming{r.Provider, blobs, g, only}}
	}
	return remotes
}

// A push is under way where the context has one.
type push struct {
	stream bool
	to     []string // repositories, in the order in which BuildKit pushes to them; "" is none

	mu   sync.Mutex
	asks map[*ref]int // how often a ref was asked for its layers
}

// done returns the repositories that have the layers of a ref, which BuildKit asks for them once for each repository, before it pushes there.
func (p *push) done(r *ref) []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := min(p.asks[r], len(p.to))
	p.asks[r]++
	return p.to[:n]
}

type pushKey struct{}

// pushing is what BuildKit's image exporter does at last: from then on it asks the refs for their layers only to read what the registry has
// not got. It pushes to one name after another: what goes to several registries is read from where it is for each of them, and kept for none.
func (i *instance) pushing(finalize bkexporter.FinalizeFunc, src *bkexporter.Source, names, sessionID string) bkexporter.FinalizeFunc {
	if finalize == nil || i.blobs == nil {
		return finalize
	}
	repositories := repositoriesOf(names)
	done := wanted.addPush(sessionID, src)
	return func(ctx context.Context) error {
		defer done()
		p := &push{stream: wanted.alone(sessionID, aPush), to: repositories, asks: map[*ref]int{}}
		if err := finalize(context.WithValue(ctx, pushKey{}, p)); err != nil {
			return refused(err, names)
		}
		for n, r := range repositories {
			if r == "" || slices.Contains(repositories[:n], r) {
				continue
			}
			_ = src.EachRef(func(ref cache.ImmutableRef) error {
				if err := i.blobs.Pushed(ctx, ref, r); err != nil {
					bklog.G(ctx).WithError(err).WithField("repository", r).Warn("that a repository has the layers isn't kept")
				}
				return nil
			})
		}
		return nil
	}
}

// repositoriesOf returns the repositories of image names, which commas separate, for each name one: "" of what isn't one.
func repositoriesOf(names string) (repositories []string) {
	for name := range strings.SplitSeq(names, ",") {
		locator := ""
		if r, err := reference.ParseNormalizedNamed(name); err == nil {
			locator = r.Name()
		}
		repositories = append(repositories, locator)
	}
	return repositories
}

// toPush prepares a remote for being pushed, if that is under way.
func (r *ref) toPush(ctx context.Context, remote *solver.Remote, g session.Group) *solver.Remote {
	p, ok := ctx.Value(pushKey{}).(*push)
	if !ok {
		return remote
	}
	done := p.done(r)
	remote = &solver.Remote{Descriptors: slices.Clone(remote.Descriptors), Provider: remote.Provider}
	for i := range remote.Descriptors {
		d := &remote.Descriptors[i]
		d.Annotations = withSources(d.Annotations, slices.Concat(r.blobs.Repositories(d.Digest), done))
	}
	if p.stream {
		remote.Provider = &streaming{remote.Provider, r.blobs, g, nil}
	}
	return remote
}

// withSources adds the annotations by which a push finds repositories to have a blob mounted from.
func withSources(annotations map[string]string, repositories []string) map[string]string {
	if len(repositories) == 0 {
		return annotations
	}
	annotations = maps.Clone(annotations)
	if annotations == nil {
		annotations = map[string]string{}
	}
	for _, r := range repositories {
		u, err := url.Parse("dummy://" + r) // as BuildKit and containerd do: without the port
		if err != nil || r == "" {
			continue
		}
		key, repo := labels.LabelDistributionSource+"."+u.Hostname(), strings.TrimPrefix(u.Path, "/")
		if had := annotations[key]; had == "" {
			annotations[key] = repo
		} else if !slices.Contains(strings.Split(had, ","), repo) {
			annotations[key] = had + "," + repo
		}
	}
	return annotations
}

// nameOf returns the names that an exporter has given its image.
func nameOf(response map[string]string) string { return response[exptypes.ExporterImageNameKey] }
