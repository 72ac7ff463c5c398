package integration

import (
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// uploaded returns the bytes that a registry has received of each blob that was uploaded.
func uploaded(reg *registry.Registry) map[digest.Digest]int64 {
	got := map[digest.Digest]int64{}
	for _, e := range reg.Log.Entries() {
		u, err := url.Parse(e.Path)
		if err == nil && e.Method == http.MethodPut && strings.Contains(e.Path, "/blobs/uploads/") {
			got[digest.Digest(u.Query().Get("digest"))] += e.Received
		}
	}
	return got
}

// wantNotStored fails the test if the daemon's content store has one of the blobs, or a part of one.
func wantNotStored(t *testing.T, d *daemon.Daemon, blobs ...digest.Digest) {
	t.Helper()
	found := false
	err := filepath.WalkDir(d.Root, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return nil //nolint:nilerr // a directory that has just gone
		}
		if e.IsDir() && e.Name() == "content" {
			found = true
		}
		for _, b := range blobs {
			if e.Name() == b.Encoded() && strings.Contains(path, "/content/blobs/") {
				t.Errorf("the content store has %s", b)
			}
		}
		return nil
	})
	if err != nil || !found {
		t.Errorf("no content store below %s: %v", d.Root, err)
	}
	// BuildKit writes the history of a build when the client has its answer.
	for deadline := time.Now().Add(10 * time.Second); len(ingests(d)) > 0; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Errorf("left of ingests: %q", ingests(d))
			return
		}
	}
}

// twoRegistries are one with a lazy base of 16 MiB, and an empty one, of which the daemon knows both.
type twoRegistries struct {
	from, to *registry.Registry
	config   string
	base     v1.Image
	layers   []digest.Digest
}

func newTwoRegistries(t *testing.T) *twoRegistries {
	r := &twoRegistries{from: startRegistry(t, registry.Options{}), to: startRegistry(t, registry.Options{})}
	r.base, _ = push(t, r.from, "team/base:1", busybox(t, bigLayer(t, 16<<20)), baseimage.EStargz)
	r.layers = layerDigests(t, r.base)
	r.config = plainHTTP(r.from) + "[registry.\"" + strings.TrimSuffix(r.target(""), "/") + "\"]\nhttp = true\n"
	return r
}

// target is a name in the empty registry. It's at another host than the other one, as BuildKit and containerd leave the port out where they
// note which registry has a blob.
func (r *twoRegistries) target(name string) string {
	return strings.Replace(r.to.Ref(name), "127.0.0.1", "localhost", 1)
}

// solve pushes a new layer on top of the base, which no step reads.
func (r *twoRegistries) solve(tag string) client.Solve {
	return client.Solve{
		Dockerfile: "FROM " + r.from.Ref("team/base:1") + "\nCOPY Dockerfile /new\n",
		Outputs:    []string{"type=image,name=" + r.target(tag) + ",push=true,compression=estargz"},
	}
}

func (r *twoRegistries) pull(t *testing.T, tag string) v1.Image {
	t.Helper()
	ref, err := name.ParseReference(r.to.Ref(tag))
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(ref, remote.WithContext(t.Context()), remote.WithTransport(r.to.Transport()))
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Image(img); err != nil {
		t.Error(err)
	}
	return img
}

// TestPushPassesOn pushes an image on a lazy base to another registry than the base's: its layers go from one to the other, and aren't
// kept. What the other one has is neither fetched nor sent, also in another repository, and after a restart.
func TestPushPassesOn(t *testing.T) { eachDoor(t, testPushPassesOn) }

func testPushPassesOn(t *testing.T) {
	r := newTwoRegistries(t)
	opt := daemon.Options{Config: r.config, Root: t.TempDir()}
	d := startDaemon(t, opt)
	s := r.solve("app:1")
	s.Context = filepath.Dir(writeFile(t, t.TempDir(), "Dockerfile", s.Dockerfile))
	r.from.Log.Reset()
	res := build(t, d, s)
	sent, received := r.from.Log.BlobBytes(), uploaded(r.to)
	for i, l := range r.layers {
		size := sizeOf(t, r.base, l)
		if received[l] != size {
			t.Errorf("base layer %d: %d bytes of %d were uploaded", i, received[l], size)
		}
		if sent[l] < size || sent[l] > size+size/10+100<<10 { // the table of contents is read too
			t.Errorf("base layer %d: %d bytes of %d were fetched", i, sent[l], size)
		}
	}
	wantNotStored(t, d, r.layers...)
	img := r.pull(t, "app:1")
	for i, l := range r.layers {
		if got := layerDigests(t, img)[i]; got != l {
			t.Errorf("layer %d is %s, the base's is %s", i, got, l)
		}
	}
	wantContains(t, "progress", statuses(res), "passing on layer "+r.layers[1].String())

	again := func(t *testing.T, d *daemon.Daemon, tag string) {
		t.Helper()
		r.from.Log.Reset()
		r.to.Log.Reset()
		s := s
		s.Outputs = r.solve(tag).Outputs
		build(t, d, s)
		if n := blobsRead(t, r.from, r.base); n > 200<<10 {
			t.Errorf("%s: %d bytes of the base were fetched", tag, n)
		}
		for l, n := range uploaded(r.to) {
			if sizeOf(t, img, l) > 100<<10 {
				t.Errorf("%s: %d bytes of layer %s were uploaded", tag, n, l)
			}
		}
		r.pull(t, tag)
	}
	again(t, d, "app:2")
	again(t, d, "other:1")
	stopDaemon(t, d)
	d = startDaemon(t, opt)
	again(t, d, "third:1")
	wantNotStored(t, d, r.layers...)
}

func sizeOf(t *testing.T, img v1.Image, d digest.Digest) int64 {
	t.Helper()
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range m.Layers {
		if l.Digest.String() == d.String() {
			return l.Size
		}
	}
	return 0
}

// statuses are the lines below the steps of a build.
func statuses(res *client.Result) string {
	var b strings.Builder
	for _, v := range res.Vertices {
		for _, s := range v.Statuses {
			b.WriteString(s.ID + "\n")
		}
	}
	return b.String()
}

// A streamFault befalls a blob that is passed on, or converted, while it's read.
type streamFault struct {
	fault registry.Fault
	err   bool // ends it
}

// streamFaults are by their names, which are those of directories that the oracles mount overlays in: no commas. A byte is wrong in so many answers.
func streamFaults(wrong int) map[string]streamFault {
	return map[string]streamFault{
		"short body":  {registry.Fault{Kind: registry.ShortBody, Count: 2}, false},
		"no ranges":   {registry.Fault{Kind: registry.IgnoreRange}, false},
		"503":         {registry.Fault{Kind: registry.Status, Code: http.StatusServiceUnavailable, Count: 2}, false},
		"a byte once": {registry.Fault{Kind: registry.Corrupt, Offset: 1 << 20, Count: wrong}, false},
		"a byte ever": {registry.Fault{Kind: registry.Corrupt, Offset: 1 << 20}, true},
		"gone":        {registry.Fault{Kind: registry.Status, Code: http.StatusNotFound}, true},
	}
}

// TestPushPassesOnWithFaults has the base's registry fail while its layers go to another one.
func TestPushPassesOnWithFaults(t *testing.T) {
	for name, c := range streamFaults(1) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newTwoRegistries(t)
			d := startDaemon(t, daemon.Options{Config: r.config})
			s := r.solve("app:1")
			s.Context = filepath.Dir(writeFile(t, t.TempDir(), "Dockerfile", s.Dockerfile))
			noPush := s
			noPush.Outputs = nil
			build(t, d, noPush) // the layers are mounted
			big := r.layers[1]
			c.fault.Match = registry.MatchBlob(big)
			remove := r.from.Faults.Add(c.fault)
			if !c.err {
				build(t, d, s)
				if r.from.Faults.Hits() == 0 {
					t.Error("no request was hit")
				}
			} else {
				wantContains(t, "error", buildFails(t, d, s), big.String())
				wantNotStored(t, d, big)
				remove()
				build(t, d, s)
			}
			r.pull(t, "app:1")
			wantNotStored(t, d, big)
		})
	}
}

// TestCachePassesOn exports caches of a lazy base to another registry than the base's, and to the client's disk: its layers go from one to the
// other, and aren't kept. Who imports them gets what was exported.
func TestCachePassesOn(t *testing.T) {
	for name, c := range map[string]struct {
		to, from func(r *twoRegistries, dir string) string
	}{
		"registry": {
			func(r *twoRegistries, _ string) string {
				return "type=registry,mode=max,compression=estargz,ref=" + r.target("cache:1")
			},
			func(r *twoRegistries, _ string) string { return "type=registry,ref=" + r.target("cache:1") },
		},
		"local": {
			func(_ *twoRegistries, dir string) string {
				return "type=local,mode=max,compression=estargz,dest=" + dir
			},
			func(_ *twoRegistries, dir string) string { return "type=local,src=" + dir },
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newTwoRegistries(t)
			d := startDaemon(t, daemon.Options{Config: r.config})
			dir := filepath.Join(t.TempDir(), "cache")
			s := client.Solve{Dockerfile: "FROM " + r.from.Ref("team/base:1") + "\nRUN echo made > /made\n", CacheTo: []string{c.to(r, dir)}}
			r.from.Log.Reset()
			res := build(t, d, s)
			sent, received := r.from.Log.BlobBytes(), uploaded(r.to)
			big := r.layers[1]
			size := sizeOf(t, r.base, big)
			if sent[big] < size || sent[big] > size+size/10 {
				t.Errorf("%d bytes of %d were fetched", sent[big], size)
			}
			if name == "registry" && received[big] != size {
				t.Errorf("%d bytes of %d were uploaded", received[big], size)
			}
			if name == "local" {
				if st, err := os.Stat(filepath.Join(dir, "blobs", "sha256", big.Encoded())); err != nil || st.Size() != size {
					t.Errorf("the client has %v, %v", st, err)
				}
			}
			wantNotStored(t, d, r.layers...)
			wantContains(t, "progress", statuses(res), "passing on layer "+big.String())

			other := startDaemon(t, daemon.Options{Config: r.config})
			s.CacheTo, s.CacheFrom = nil, []string{c.from(r, dir)}
			if v := build(t, other, s).Vertex("[2/2] RUN"); v == nil || !v.Cached {
				t.Errorf("what was exported isn't cached: %+v", v)
			}
		})
	}
}

// TestPushToTwoRegistries pushes to several registries, and beside a cache's export. To the names of one output, whose turns come one after another, the
// layers go from where they are, once for each registry that hasn't got them; two outputs have them once, by way of the content store.
func TestPushToTwoRegistries(t *testing.T) {
	for name, c := range map[string]struct {
		change  func(r *twoRegistries, third *registry.Registry, s *client.Solve)
		fetched int64 // times
	}{
		"two names": {func(r *twoRegistries, third *registry.Registry, s *client.Solve) {
			s.Outputs = []string{`type=image,"name=` + r.target("app:1") + "," + third.Ref("app:1") + `",push=true,compression=estargz`}
		}, 2},
		"the base's own": {func(r *twoRegistries, third *registry.Registry, s *client.Solve) {
			s.Outputs = []string{`type=image,"name=` + r.target("app:1") + "," + r.from.Ref("app:1") + "," + third.Ref("app:1") + `",push=true,compression=estargz`}
		}, 2},
		"two repositories": {func(r *twoRegistries, third *registry.Registry, s *client.Solve) {
			s.Outputs = []string{`type=image,"name=` + r.target("app:1") + "," + r.target("other:1") + "," + third.Ref("app:1") + "," + third.Ref("other:1") + `",push=true,compression=estargz`}
		}, 2},
		"two outputs": {func(_ *twoRegistries, third *registry.Registry, s *client.Solve) {
			s.Outputs = append(s.Outputs, "type=image,name="+third.Ref("app:1")+",push=true,compression=estargz")
		}, 1},
		"cache": {func(_ *twoRegistries, third *registry.Registry, s *client.Solve) {
			s.CacheTo = []string{"type=registry,mode=max,compression=estargz,ref=" + third.Ref("cache:1")}
		}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newTwoRegistries(t)
			third := startRegistry(t, registry.Options{})
			d := startDaemon(t, daemon.Options{Config: r.config + plainHTTP(third)})
			s := r.solve("app:1")
			s.Context = filepath.Dir(writeFile(t, t.TempDir(), "Dockerfile", s.Dockerfile))
			c.change(r, third, &s)
			r.from.Log.Reset()
			build(t, d, s)
			big := r.layers[1]
			size := sizeOf(t, r.base, big)
			if sent := r.from.Log.BlobBytes()[big]; sent < c.fetched*size || sent > c.fetched*size+size/10 {
				t.Errorf("%d bytes of %d were fetched, want them %d times", sent, size, c.fetched)
			}
			for _, reg := range []*registry.Registry{r.to, third} {
				if got := uploaded(reg)[big]; got != size {
					t.Errorf("%s received %d bytes of %d", reg.Host, got, size)
				}
			}
			if got := uploaded(r.from)[big]; got != 0 {
				t.Errorf("the base's own registry received %d bytes", got)
			}
			if c.fetched > 1 {
				wantNotStored(t, d, r.layers...)
			}
			r.pull(t, "app:1")
		})
	}
}
