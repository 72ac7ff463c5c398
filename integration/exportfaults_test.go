package integration

import (
	"context"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// ingests are the directories of blobs that are being written to a daemon's content store.
func ingests(d *daemon.Daemon) (dirs []string) {
	_ = filepath.WalkDir(d.Root, func(path string, _ fs.DirEntry, err error) error {
		if err == nil && filepath.Base(filepath.Dir(path)) == "ingest" && strings.Contains(path, "/content/") {
			dirs = append(dirs, path)
		}
		return nil
	})
	return dirs
}

// wantNoIngests prunes, and fails the test if a blob is left that was being written.
func wantNoIngests(t *testing.T, d *daemon.Daemon) {
	t.Helper()
	var left []string
	for range 20 {
		if out, err := (client.Buildctl{Addr: d.Addr}).Run(t.Context(), "prune"); err != nil {
			t.Fatalf("prune: %v\n%s", err, out)
		}
		if left = ingests(d); len(left) == 0 {
			return
		}
		time.Sleep(500 * time.Millisecond)
	}
	t.Errorf("left of blobs that were being written: %q", left)
}

// exportingGoroutines counts the daemon's goroutines that write layers or read them from registries.
func exportingGoroutines(t *testing.T, debug string) int {
	t.Helper()
	n := 0
	for stack := range strings.SplitSeq(get(t, "http://"+debug+"/debug/pprof/goroutine?debug=1"), "\n\n") {
		for _, of := range []string{"buildkitd-lazy/layer/", "buildkitd-lazy/exporter.", "source.(*stream)", "buildkitd-lazy/blob.(*body)"} {
			if strings.Contains(stack, of) {
				n += int(number(t, `(?m)^(\d+) @`, stack))
				break
			}
		}
	}
	return n
}

// wantNobodyExports fails the test if goroutines go on to write or read layers.
func wantNobodyExports(t *testing.T, debug string) {
	t.Helper()
	for range 100 {
		if exportingGoroutines(t, debug) == 0 {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Errorf("%d goroutines still export", exportingGoroutines(t, debug))
}

// TestExportCancelled ends the client by SIGINT in the middle of writing a layer, for a push and for an archive, and of converting and of pushing
// one that is read from its registry: nothing is left, and the next export succeeds.
func TestExportCancelled(t *testing.T) {
	r := newTwoRegistries(t)
	debug := freePort(t)
	d := startDaemon(t, daemon.Options{Config: r.config + "[grpc]\ndebugAddress = \"" + debug + "\"\n"})
	buildctl, buildx := client.Buildctl{Addr: d.Addr}, buildx(t, d.Addr)
	writes := func() bool { return len(ingests(d)) > 0 }
	hits := 0 // of faults before
	reads := func() bool { return r.from.Faults.Hits() > hits }
	for _, c := range []struct {
		name, tag, compression string
		archive                bool
		by                     interface {
			Build(ctx context.Context, s client.Solve) (*client.Result, error)
		}
		fault  registry.Fault
		middle func() bool
	}{
		{"pass on", "app:1", "estargz", false, buildctl, registry.Fault{Kind: registry.Stall, Match: registry.MatchBlob(r.layers[1])}, reads},
		{"convert", "app:8", "zstdchunked,force-compression=true", false, buildctl, registry.Fault{Kind: registry.Stall, Match: registry.MatchBlob(r.layers[1])}, reads},
		{"write", "app:2", "estargz,compression-level=9", false, buildctl, registry.Fault{}, writes},
		{"write zstd:chunked", "app:3", "zstdchunked,compression-level=22", false, buildctl, registry.Fault{}, writes},
		{"buildx", "app:4", "estargz,compression-level=9", false, buildx, registry.Fault{}, writes},
		{"buildx zstd:chunked", "app:5", "zstdchunked,compression-level=22", false, buildx, registry.Fault{}, writes},
		{"archive", "app:6", "estargz,compression-level=9", true, buildx, registry.Fault{}, writes},
		{"archive zstd:chunked", "app:7", "zstdchunked,compression-level=22", true, buildx, registry.Fault{}, writes},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := client.Solve{Dockerfile: "FROM " + r.from.Ref("team/base:1") + "\nRUN head -c 60000000 /dev/urandom > /" + c.tag + "\n"}
			build(t, d, s)
			remove := func() {}
			if c.fault.Kind != 0 {
				hits = r.from.Faults.Hits()
				remove = r.from.Faults.Add(c.fault)
			}
			s.Outputs = []string{"type=image,name=" + r.target(c.tag) + ",push=true,compression=" + c.compression}
			dest := filepath.Join(t.TempDir(), "oci.tar")
			if c.archive {
				s.Outputs = []string{"type=oci,dest=" + dest + ",compression=" + c.compression}
			}
			ctx, interrupt := context.WithCancelCause(t.Context())
			done := make(chan error, 1)
			go func() {
				res, err := c.by.Build(ctx, s)
				if err == nil && res.Err == "" {
					err = errors.New("the build succeeded")
				} else {
					err = nil
				}
				done <- err
			}()
			deadline := time.Now().Add(60 * time.Second)
			for !c.middle() {
				if time.Now().After(deadline) {
					t.Fatal("the export did not begin")
				}
				time.Sleep(5 * time.Millisecond)
			}
			interrupt(errors.New("Ctrl-C"))
			if err := <-done; err != nil {
				t.Error(err)
			}
			wantNobodyExports(t, debug)
			remove()
			wantNoIngests(t, d)
			build(t, d, s)
			if c.archive {
				if st, err := os.Stat(dest); err != nil || st.Size() < 60_000_000 {
					t.Errorf("an archive of %v, %v", st, err)
				}
			} else if strings.HasPrefix(c.compression, "zstd") {
				wantZstdOnTop(t, pull(t, r.to, c.tag))
			} else {
				r.pull(t, c.tag)
			}
		})
	}
}

// wantZstdOnTop looks whether an image's last layer is of zstd, and of its DiffID.
func wantZstdOnTop(t *testing.T, img v1.Image) {
	t.Helper()
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	last := len(layers) - 1
	if got, want := zstdDiffID(t, layers[last]).String(), cf.RootFS.DiffIDs[last].String(); got != want {
		t.Errorf("the layer's DiffID is %s, want %s", got, want)
	}
}

// TestExportWithoutRights pushes to a registry that lets nobody push: the error says which one, why, and what to do, and the next export succeeds.
func TestExportWithoutRights(t *testing.T) {
	r := newTwoRegistries(t)
	d := startDaemon(t, daemon.Options{Config: r.config})
	// Most registries give a reason in JSON, which is all that BuildKit says then; others don't.
	for format, answer := range map[string]struct{ reason, says string }{"estargz": {"DENIED", "denied"}, "zstdchunked": {"", "403"}} {
		for what, to := range map[string]client.Solve{
			"image":  {Outputs: []string{"type=image,name=" + r.target(format+"/forced:1") + ",push=true,force-compression=true,compression=" + format}},
			"passed": {Outputs: []string{"type=image,name=" + r.target(format+"/app:1") + ",push=true,compression=" + format}},
			"cache":  {CacheTo: []string{"type=registry,ref=" + r.target(format+"/cache:1") + ",mode=max,compression=" + format}},
		} {
			t.Run(format+" "+what, func(t *testing.T) {
				s := r.solve("app:1")
				s.Context = filepath.Dir(writeFile(t, t.TempDir(), "Dockerfile", s.Dockerfile))
				s.Outputs, s.CacheTo = to.Outputs, to.CacheTo
				remove := r.to.Faults.Add(registry.Fault{Kind: registry.Status, Code: http.StatusForbidden, Reason: answer.reason, Match: func(r *http.Request) bool {
					return r.Method == http.MethodPost || r.Method == http.MethodPut
				}})
				r.from.Log.Reset()
				wantContains(t, "error", buildFails(t, d, s), answer.says, "there is no right to write there: `docker login "+strings.TrimSuffix(r.target(""), "/")+"` with")
				if sent := r.from.Log.BlobBytes()[r.layers[1]]; what != "image" && sent > sizeOf(t, r.base, r.layers[1])/4 {
					t.Errorf("%d bytes of a layer were fetched that nobody takes", sent)
				}
				wantNoIngests(t, d)
				remove()
				build(t, d, s)
				if what == "passed" && format == "estargz" {
					r.pull(t, "estargz/app:1")
				}
			})
		}
	}
}

// TestExportToFullDisk has no room for the layer that is written: the error says so, and once there is some the export succeeds.
func TestExportToFullDisk(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:estargz", busybox(t), baseimage.EStargz)
	eachDoorAtOnce(t, func(t *testing.T, door []string) {
		for _, format := range []string{"estargz", "zstdchunked"} {
			t.Run(format, func(t *testing.T) {
				dir, ballast := smallDisk(t, door)
				d := startDaemon(t, daemon.Options{Config: plainHTTP(reg), Env: door, Root: filepath.Join(dir, "root")})
				tag := format + ":" + strings.TrimPrefix(door[0], "BUILDKITD_LAZY_MOUNT=")
				s := client.Solve{Dockerfile: "FROM " + reg.Ref("base:estargz") + "\nRUN head -c 16000000 /dev/urandom > /large\n"}
				build(t, d, s)
				archive := s
				archive.Outputs = []string{"type=oci,dest=" + filepath.Join(t.TempDir(), "oci.tar") + ",compression=" + format}
				s.Outputs = []string{"type=image,name=" + reg.Ref(tag) + ",push=true,compression=" + format}
				for _, s := range []client.Solve{s, archive} {
					wantContains(t, "error", buildFails(t, d, s), "no space left on device")
				}
				if err := os.Remove(ballast); err != nil {
					t.Fatal(err)
				}
				build(t, d, s)
				build(t, d, archive)
				wantNoIngests(t, d)
				if img := pull(t, reg, tag); format == "estargz" {
					wantEStargz(t, img)
				} else {
					wantZstdOnTop(t, img)
				}
			})
		}
	})
}
