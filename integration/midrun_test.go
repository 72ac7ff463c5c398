package integration

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// midRUN is an image in a directory that any number of registries serve, for steps in the middle of which something happens to
// the registry. Its second layer has big/0 to big/31, of 1 MiB, and many, of three chunks.
type midRUN struct {
	dir string
	img v1.Image
	top digest.Digest
}

const (
	midRUNName  = "library/midrun:1"
	chunkOfMany = 4 << 20 // what stargz-snapshotter makes of a file
)

func newMidRUN(t *testing.T) *midRUN {
	t.Helper()
	m := &midRUN{dir: t.TempDir()}
	entries := []baseimage.Entry{baseimage.Dir("big")}
	for i := range 32 {
		entries = append(entries, baseimage.File(fmt.Sprintf("big/%d", i), noise(uint64(i), 1<<20)))
	}
	entries = append(entries, baseimage.File("many", noise(1000, 2*chunkOfMany+1<<20)))
	reg := startRegistry(t, registry.Options{Dir: m.dir})
	m.img, _ = push(t, reg, midRUNName, busybox(t, layer(t, "midrun", entries...)), baseimage.EStargz)
	m.top = layerDigests(t, m.img)[1]
	return m
}

// serve starts another registry with the image.
func (m *midRUN) serve(t *testing.T, opt registry.Options) *registry.Registry {
	t.Helper()
	opt.Dir = m.dir
	return startRegistry(t, opt)
}

// between is a step that reads, gets a signal's URL, and reads on.
func between(from, signal string) string {
	return "FROM " + from + "\nRUN sha256sum /big/0 && wget -q -O /dev/null " + signal + " && sha256sum /big/28 /big/14 /big/20\n"
}

// wantBetween fails the test unless the step has read what is there, from lazy layers.
func wantBetween(t *testing.T, res *client.Result) {
	t.Helper()
	for _, i := range []uint64{0, 28, 14, 20} {
		wantContains(t, "output", res.Output(), digest.FromString(noise(i, 1<<20)).Encoded())
	}
	if rep := reportOf(t, res); rep.Images[0].Lazy != 2 {
		t.Errorf("%d layers are lazy, want 2", rep.Images[0].Lazy)
	}
}

// frameOf returns where in the blob the chunk at off of a file is.
func (m *midRUN) frameOf(t *testing.T, file string, off int64) (start, end int64) {
	t.Helper()
	blob := layerBlob(t, m.img, hash(t, m.top))
	r, err := estargz.Open(io.NewSectionReader(bytes.NewReader(blob), 0, int64(len(blob))))
	if err != nil {
		t.Fatal(err)
	}
	e, ok := r.ChunkEntryForOffset(file, off)
	if !ok {
		t.Fatalf("%s has no chunk at %d", file, off)
	}
	return e.Offset, e.NextOffset()
}

// TestFaultsInMidRUN are faults that begin in the middle of a step, and pass: the step must not notice.
func TestFaultsInMidRUN(t *testing.T) {
	m := newMidRUN(t)
	for _, c := range []struct {
		name  string
		fault registry.Fault
		// config is of the daemon, which else has its defaults.
		config string
		// waits is how long the step is held up at least.
		waits time.Duration
	}{
		{name: "503 for 20 s", fault: registry.Fault{Kind: registry.Status, Code: http.StatusServiceUnavailable, For: 20 * time.Second}, waits: 15 * time.Second},
		{name: "20 s of silence", fault: registry.Fault{Kind: registry.Silence, For: 20 * time.Second}, waits: 15 * time.Second},
		{name: "silence in mid-body", fault: registry.Fault{Kind: registry.Stall, For: 10 * time.Second}, waits: 5 * time.Second},
		{name: "silence for good", fault: registry.Fault{Kind: registry.Silence, Count: 2}, config: "[lazy]\nfetch-timeout = \"6s\"\n"},
		{name: "resets for 5 s", fault: registry.Fault{Kind: registry.Reset, For: 5 * time.Second}, waits: 3 * time.Second},
		{name: "429 with Retry-After", fault: registry.Fault{Kind: registry.Status, Code: http.StatusTooManyRequests, RetryAfter: 3 * time.Second, Count: 2}, waits: 3 * time.Second},
		{name: "500 twice", fault: registry.Fault{Kind: registry.Status, Code: http.StatusInternalServerError, Count: 2}},
		{name: "200 to some ranges", fault: registry.Fault{Kind: registry.IgnoreRange, Count: 4}},
		{name: "200 to every range", fault: registry.Fault{Kind: registry.IgnoreRange}},
		{name: "short bodies", fault: registry.Fault{Kind: registry.ShortBody, Count: 3}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			eachDoorAtOnce(t, func(t *testing.T, env []string) {
				reg := m.serve(t, registry.Options{})
				d := startDaemon(t, daemon.Options{Config: plainHTTP(reg) + c.config, Env: env})
				fault := reg.OnSignal("fault", func(*http.Request) string {
					reg.Faults.Add(c.fault)
					return ""
				})
				res := build(t, d, client.Solve{Dockerfile: between(reg.Ref(midRUNName), fault)})
				wantBetween(t, res)
				if reg.Faults.Hits() == 0 {
					t.Error("no request was hit: the step had all that it reads before")
				}
				if res.Total < c.waits {
					t.Errorf("the build took %v, want at least %v", res.Total, c.waits)
				}
			})
		})
	}
}

// TestSignedURLExpiresInMidRUN has the URLs of a registry's object store expire in the middle of a step.
func TestSignedURLExpiresInMidRUN(t *testing.T) {
	m := newMidRUN(t)
	eachDoorAtOnce(t, func(t *testing.T, door []string) {
		reg := m.serve(t, registry.Options{SignedURLs: true, Auth: registry.Token, Username: "ada", Password: "lovelace, 1815"})
		dir := t.TempDir()
		if err := reg.DockerConfig(dir); err != nil {
			t.Fatal(err)
		}
		expire := reg.OnSignal("expire", func(*http.Request) string {
			reg.ExpireURLs()
			return ""
		})
		d := startDaemon(t, daemon.Options{Config: plainHTTP(reg), Env: door})
		res := build(t, d, client.Solve{Dockerfile: between(reg.Ref(midRUNName), expire), Env: []string{"DOCKER_CONFIG=" + dir}})
		wantBetween(t, res)
		status := map[int]int{}
		for _, e := range reg.Log.Entries(registry.Entry.Blob) {
			if strings.HasPrefix(e.Path, "/store/") {
				status[e.Status]++
			}
		}
		if status[http.StatusForbidden] == 0 || status[http.StatusPartialContent] < 2 {
			t.Errorf("the object store answered %v: want ranges, and 403 to a URL that has expired", status)
		}
		if status[http.StatusBadRequest] > 0 {
			t.Error("the registry's authorization has gone to the object store")
		}
		if strings.Contains(d.Logs(), registry.SignatureParameter) {
			t.Error("a signed URL is in the daemon's log")
		}
	})
}

// TestFirstMirrorDiesInMidRUN loses the mirror that a step reads from.
func TestFirstMirrorDiesInMidRUN(t *testing.T) {
	m := newMidRUN(t)
	for name, die := range map[string]func(t *testing.T, first *registry.Registry){
		"refuses": func(t *testing.T, first *registry.Registry) {
			if err := first.Close(); err != nil {
				t.Error(err)
			}
		},
		"hangs": func(_ *testing.T, first *registry.Registry) {
			first.Faults.Add(registry.Fault{Kind: registry.Silence, Match: registry.MatchAny})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			eachDoorAtOnce(t, func(t *testing.T, door []string) {
				first, second := m.serve(t, registry.Options{}), m.serve(t, registry.Options{})
				signal := second.OnSignal("die", func(*http.Request) string {
					die(t, first)
					return ""
				})
				// A host has a third of the timeout to answer.
				d := startDaemon(t, daemon.Options{Env: door, Config: fmt.Sprintf("[registry.\"docker.io\"]\nmirrors = [%q, %q]\n", first.Host, second.Host) +
					plainHTTP(first) + plainHTTP(second) + "[lazy]\nfetch-timeout = \"36s\"\n"})
				res := build(t, d, client.Solve{Dockerfile: between("midrun:1", signal)})
				wantBetween(t, res)
				if once, _ := first.Log.Sent(m.top); once == 0 {
					t.Error("nothing was read from the first mirror while it lived")
				}
				if once, _ := second.Log.Sent(m.top); once == 0 {
					t.Error("nothing was read from the second mirror")
				}
				// The first to wait finds out for all.
				if limit := 23 * time.Second; res.Total > limit {
					t.Errorf("the build took %v, want less than %v: each read has waited for the dead mirror", res.Total, limit)
				}
			})
		})
	}
}

// TestFlippedByteIsFetchedAgain has a byte of a frame arrive wrong once: the step gets the right one.
func TestFlippedByteIsFetchedAgain(t *testing.T) {
	m := newMidRUN(t)
	start, end := m.frameOf(t, "many", chunkOfMany)
	at := (start + end) / 2
	eachDoorAtOnce(t, func(t *testing.T, door []string) {
		reg := m.serve(t, registry.Options{})
		reg.Faults.Add(registry.Fault{Kind: registry.Corrupt, Match: registry.MatchByte(m.top, at), Offset: at, Count: 1})
		d := startDaemon(t, daemon.Options{Config: plainHTTP(reg), Env: door})
		res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref(midRUNName) + "\nRUN sha256sum /big/0 /many\n"})
		wantContains(t, "output", res.Output(), digest.FromString(noise(1000, 2*chunkOfMany+1<<20)).Encoded())
		if hits := reg.Faults.Hits(); hits != 1 {
			t.Errorf("%d answers had the wrong byte, want 1", hits)
		}
		if _, again := reg.Log.Sent(m.top); again < end-start-1<<10 || again > end-start+1<<20 {
			t.Errorf("%d bytes were fetched again, want the frame's %d", again, end-start)
		}
	})
}

// TestCorruptBytesNeverReachAStep has a byte of a frame arrive wrong whenever it is asked for. The step gets an I/O error, and
// the build's says which layer, file and chunk. Nothing wrong is kept: without the fault the same build succeeds.
func TestCorruptBytesNeverReachAStep(t *testing.T) {
	m := newMidRUN(t)
	start, end := m.frameOf(t, "many", chunkOfMany)
	at := (start + end) / 2
	eachDoorAtOnce(t, func(t *testing.T, door []string) {
		reg := m.serve(t, registry.Options{})
		remove := reg.Faults.Add(registry.Fault{Kind: registry.Corrupt, Match: registry.MatchByte(m.top, at), Offset: at})
		d := startDaemon(t, daemon.Options{Config: plainHTTP(reg), Env: door})
		s := client.Solve{Dockerfile: "FROM " + reg.Ref(midRUNName) + "\nRUN sha256sum /big/3 && sha256sum /many\n"}
		many := digest.FromString(noise(1000, 2*chunkOfMany+1<<20)).Encoded()
		for range 2 { // the second finds what the first has left
			res := tryBuild(t, d, s)
			if res.Err == "" || strings.Contains(res.Output(), "  /many") {
				t.Fatalf("a step has read corrupt bytes:\n%s", res.Output())
			}
			wantContains(t, "output", res.Output(), digest.FromString(noise(3, 1<<20)).Encoded(), "'/many': Input/output error")
			wantContains(t, "error", res.Err, m.top.String(), "read many (layer ", "chunk 1: ", "digest mismatch")
		}
		if hits := reg.Faults.Hits(); hits < 4 {
			t.Errorf("%d answers had the wrong byte, want each build to have fetched it twice", hits)
		}
		remove()
		res := build(t, d, s)
		wantContains(t, "output after the fault", res.Output(), many)
	})
}
