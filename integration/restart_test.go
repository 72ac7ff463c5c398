package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// TestRestartLosesNothing ends the daemon after a build. The same build is all CACHED afterwards, without a byte of a
// layer, and what was built on the lazy image can be built upon.
func TestRestartLosesNothing(t *testing.T) {
	for name, end := range map[string]func(*testing.T, *daemon.Daemon){
		"SIGTERM": stopDaemon,
		"SIGKILL": func(_ *testing.T, d *daemon.Daemon) { d.Kill() },
	} {
		t.Run(name, func(t *testing.T) {
			reg := startRegistry(t, registry.Options{})
			img, _ := push(t, reg, "base:estargz", busybox(t, bigLayer(t, 16<<20)), baseimage.EStargz)
			opt := daemon.Options{Config: plainHTTP(reg), Root: t.TempDir()}
			dockerfile := "FROM " + reg.Ref("base:estargz") + "\nRUN sha256sum /big/1 && echo made > /made\nRUN cat /made\n"
			first := startDaemon(t, opt)
			build(t, first, client.Solve{Dockerfile: dockerfile})
			end(t, first)

			reg.Log.Reset()
			second := startDaemon(t, opt)
			if mounts, err := second.Mounts(); err != nil || len(mounts) > 0 {
				t.Errorf("mounts of a daemon that nobody has used: %q, %v", mounts, err)
			}
			res := build(t, second, client.Solve{Dockerfile: dockerfile})
			for _, step := range []string{"sha256sum", "cat"} {
				if v := res.Vertex(step); v == nil || !v.Cached {
					t.Errorf("step %s is %+v, want it cached", step, v)
				}
			}
			res = build(t, second, client.Solve{Dockerfile: dockerfile + "RUN cat /made && sha256sum /big/1\n"})
			wantContains(t, "output", res.Output(), "made", digest.FromString(noise(1, 1<<20)).Encoded())
			if read := blobsRead(t, reg, img); read > 0 {
				t.Errorf("what had arrived before was fetched again: %d bytes", read)
			}
			res = build(t, second, client.Solve{Dockerfile: dockerfile + "RUN sha256sum /big/9\n"})
			wantContains(t, "output", res.Output(), digest.FromString(noise(9, 1<<20)).Encoded())
			if read := blobsRead(t, reg, img); read < 1<<20 {
				t.Errorf("a file that was missing was read from %d bytes", read)
			}

			// A third life: what the second one used, what it didn't, and what is in no image.
			stopDaemon(t, second)
			reg.Log.Reset()
			third := startDaemon(t, opt)
			res = build(t, third, client.Solve{Dockerfile: dockerfile + "RUN sha256sum /big/9\nRUN cat /made && sha256sum /big/9 /big/1\n"})
			if v := res.Vertex("RUN sha256sum /big/9"); v == nil || !v.Cached {
				t.Errorf("the second daemon's step is %+v, want it cached", v)
			}
			wantContains(t, "output", res.Output(), "made", digest.FromString(noise(9, 1<<20)).Encoded())
			if read := blobsRead(t, reg, img); read > 0 {
				t.Errorf("the third daemon fetched %d bytes again", read)
			}
		})
	}
}

// TestRestartWithExport exports an image built before a restart: its lazy layers are referred to, and fetched for a tar.
func TestRestartWithExport(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	img, _ := push(t, reg, "base:estargz", busybox(t, bigLayer(t, 4<<20)), baseimage.EStargz)
	opt := daemon.Options{Config: plainHTTP(reg), Root: t.TempDir()}
	s := client.Solve{Dockerfile: "FROM " + reg.Ref("base:estargz") + "\nRUN echo made > /made\n"}
	first := startDaemon(t, opt)
	build(t, first, s)
	stopDaemon(t, first)
	reg.Log.Reset()
	second := startDaemon(t, opt)
	s.Outputs = []string{"type=image,push=true,registry.insecure=true,name=" + reg.Ref("derived:latest")}
	build(t, second, s)
	if read := blobsRead(t, reg, img); read > 0 {
		t.Errorf("pushing to the base image's registry fetched %d bytes of its layers", read)
	}
	s.Outputs = []string{"type=docker,dest=" + filepath.Join(t.TempDir(), "image.tar")}
	build(t, second, s)
	if read, size := blobsRead(t, reg, img), imageSize(t, img); read < size {
		t.Errorf("a tar of %d bytes of layers was made from %d", size, read)
	}
}

// TestDiskUsageAndPrune looks at what lazy layers take, as it grows, and has it freed.
func TestDiskUsageAndPrune(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:estargz", busybox(t, bigLayer(t, 16<<20)), baseimage.EStargz)
	opt := daemon.Options{Config: plainHTTP(reg), Root: t.TempDir()}
	d := startDaemon(t, opt)
	from := "FROM " + reg.Ref("base:estargz") + "\n"
	build(t, d, client.Solve{Dockerfile: from + "RUN sha256sum /big/1\n"})
	before := usedBy(t, d)
	if before < 1<<20 {
		t.Errorf("du shows %d bytes after a step that read 1 MiB", before)
	}
	build(t, d, client.Solve{Dockerfile: from + "RUN cat /big/4 /big/5 /big/6 /big/7 | sha256sum\n"})
	after := usedBy(t, d)
	if after-before < 3<<20 {
		t.Errorf("du shows %d bytes, then %d after a step that read 4 MiB more", before, after)
	}
	stopDaemon(t, d)
	d = startDaemon(t, opt)
	if again := usedBy(t, d); again < after-1<<20 || again > after+1<<20 {
		t.Errorf("du shows %d bytes after a restart, %d before", again, after)
	}
	kept := stored(t, d)
	if kept < 5<<20 {
		t.Fatalf("the store takes %d bytes", kept)
	}
	if out, err := (client.Buildctl{Addr: d.Addr}).Run(t.Context(), "prune", "--all"); err != nil {
		t.Fatalf("prune: %v\n%s", err, out)
	}
	if left := stored(t, d); left > 100_000 {
		t.Errorf("after prune the store takes %d bytes of %d", left, kept)
	}
	if left := usedBy(t, d); left > 0 {
		t.Errorf("after prune du shows %d bytes", left)
	}
	res := build(t, d, client.Solve{Dockerfile: from + "RUN sha256sum /big/1\n"})
	wantContains(t, "output", res.Output(), digest.FromString(noise(1, 1<<20)).Encoded())
}

// TestDiskUsageOfAMixedImage looks at what a layer takes that is pulled and unpacked below a lazy one: its blob, and its files.
func TestDiskUsageOfAMixedImage(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "mixed:1", busybox(t, bigLayer(t, 8<<20), layer(t, "top", baseimage.File("top", "lazy\n"))), baseimage.Gzip, baseimage.Gzip, baseimage.EStargz)
	opt := daemon.Options{Config: plainHTTP(reg), Root: t.TempDir()}
	d := startDaemon(t, opt)
	res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("mixed:1") + "\nRUN cat /top\n"})
	if rep := reportOf(t, res); rep.Images[0].Lazy != 1 {
		t.Fatalf("%d layers are lazy, want the topmost one", rep.Images[0].Lazy)
	}
	if du := usedBy(t, d); du < 16<<20 {
		t.Errorf("du shows %d bytes, of 8 MiB compressed and 8 MiB of files", du)
	}
	stopDaemon(t, d)
	d = startDaemon(t, opt)
	if du := usedBy(t, d); du < 16<<20 {
		t.Errorf("after a restart du shows %d bytes, of 8 MiB compressed and 8 MiB of files", du)
	}
	if out, err := (client.Buildctl{Addr: d.Addr}).Run(t.Context(), "prune", "--all"); err != nil {
		t.Fatalf("prune: %v\n%s", err, out)
	}
	if left := usedBy(t, d); left > 0 {
		t.Errorf("after prune du shows %d bytes", left)
	}
}

// TestGCPolicyBoundsLazyLayers prunes by size: lazy layers count, and the least recently used go.
func TestGCPolicyBoundsLazyLayers(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "old:estargz", busybox(t, bigLayer(t, 16<<20)), baseimage.EStargz)
	push(t, reg, "new:estargz", busybox(t, bigLayer(t, 4<<20)), baseimage.EStargz)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("old:estargz") + "\nRUN cat /big/* | sha256sum\n"})
	second := client.Solve{Dockerfile: "FROM " + reg.Ref("new:estargz") + "\nRUN sha256sum /big/0\n"}
	build(t, d, second)
	if before := usedBy(t, d); before < 16<<20 {
		t.Fatalf("du shows %d bytes", before)
	}
	if out, err := (client.Buildctl{Addr: d.Addr}).Run(t.Context(), "prune", "--all", "--keep-storage", "10"); err != nil {
		t.Fatalf("prune: %v\n%s", err, out)
	}
	if du, disk := usedBy(t, d), stored(t, d); du > 10e6 || disk > 10e6 || du < 1<<20 {
		t.Errorf("pruned to 10 MB, du shows %d bytes, the store takes %d", du, disk)
	}
	res := build(t, d, second)
	if v := res.Vertex("sha256sum"); v == nil || !v.Cached {
		t.Errorf("the step used last is %+v, want it cached", v)
	}
}

// TestLazyLayersAreReportedAfterARestart has layers converted that nobody has mounted since: reports call them lazy, as they did.
func TestLazyLayersAreReportedAfterARestart(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:1", busybox(t, bigLayer(t, 4<<20)), baseimage.EStargz)
	opt := daemon.Options{Config: plainHTTP(reg), Root: t.TempDir()}
	d := startDaemon(t, opt)
	from := "FROM " + reg.Ref("base:1") + "\n"
	build(t, d, client.Solve{Dockerfile: from + "RUN cat /big/* | sha256sum\n"})
	stopDaemon(t, d)
	d = startDaemon(t, opt)
	res := build(t, d, client.Solve{
		Dockerfile: from, Outputs: []string{"type=image,push=true,registry.insecure=true,compression=zstdchunked,force-compression=true,name=" + reg.Ref("app:1")},
	})
	if rep := reportOf(t, res); rep.Images[0].Lazy != 2 {
		t.Errorf("%d lazy layers, want 2: %+v", rep.Images[0].Lazy, rep.Images[0])
	}
}

// TestMaxSize runs a daemon whose lazy layers may take less than the builds read.
func TestMaxSize(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:estargz", busybox(t, bigLayer(t, 16<<20)), baseimage.EStargz)
	opt := daemon.Options{Config: plainHTTP(reg) + "[lazy]\nmax-size = \"4MiB\"\n", Root: t.TempDir()}
	d := startDaemon(t, opt)
	dockerfile := "FROM " + reg.Ref("base:estargz") + "\nRUN cat /big/* | sha256sum\n"
	build(t, d, client.Solve{Dockerfile: dockerfile})
	usedBy(t, d) // BuildKit notes what the layers take
	stopDaemon(t, d)
	d = startDaemon(t, opt)
	waitForRoom(t, d, 4<<20)
	if du := usedBy(t, d); du > 5<<20 {
		t.Errorf("du shows %d bytes, where the store takes %d", du, stored(t, d))
	}
	res := build(t, d, client.Solve{Dockerfile: dockerfile + "RUN sha256sum /big/3\n"})
	if v := res.Vertex("RUN cat"); v == nil || !v.Cached {
		t.Errorf("the step is %+v, want it cached", v)
	}
	wantContains(t, "output", res.Output(), digest.FromString(noise(3, 1<<20)).Encoded())
}

// TestMaxSizeIsKept bounds the layers below what BuildKit keeps: of a step's result that nobody has asked for, the snapshot that it was written to, and of what
// was exported, a view.
func TestMaxSizeIsKept(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:estargz", busybox(t, bigLayer(t, 16<<20)), baseimage.EStargz)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg) + "[lazy]\nmax-size = \"4MiB\"\n"})
	dockerfile := "FROM " + reg.Ref("base:estargz") + "\nRUN cat /big/* | sha256sum\nRUN echo one >/file\n"
	exported := func(compression string) client.Solve {
		return client.Solve{Dockerfile: dockerfile, Outputs: []string{
			"type=image,push=true,registry.insecure=true,force-compression=true,compression=" + compression + ",name=" + reg.Ref("app:"+compression),
		}}
	}
	build(t, d, client.Solve{Dockerfile: dockerfile})
	waitForRoom(t, d, 4<<20)
	build(t, d, exported("estargz"))
	waitForRoom(t, d, 4<<20)

	res := build(t, d, client.Solve{Dockerfile: dockerfile + "RUN cat /file; sha256sum /big/3\n"})
	wantContains(t, "output", res.Output(), "one", digest.FromString(noise(3, 1<<20)).Encoded())
	if v := res.Vertex("RUN cat /big"); v == nil || !v.Cached {
		t.Errorf("the step is %+v, want it cached", v)
	}
	// What reads the view, which is there already.
	waitForRoom(t, d, 4<<20)
	dir := t.TempDir()
	build(t, d, client.Solve{Dockerfile: dockerfile + "FROM scratch\nCOPY --from=0 /big/5 /file /\n", Outputs: []string{"type=local,dest=" + dir}})
	if got, err := os.ReadFile(filepath.Join(dir, "5")); err != nil || string(got) != noise(5, 1<<20) {
		t.Errorf("copied: %d bytes, %v, want those of the layer", len(got), err)
	}
	build(t, d, exported("zstd"))
}

// waitForRoom waits until the daemon's lazy layers take no more than limit bytes.
func waitForRoom(t *testing.T, d *daemon.Daemon, limit int64) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); stored(t, d) > limit; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("lazy layers take %d bytes, where they may take %d", stored(t, d), limit)
		}
	}
}

// usedBy returns the sum of what du shows, in bytes.
func usedBy(t *testing.T, d *daemon.Daemon) int64 {
	t.Helper()
	out, err := (client.Buildctl{Addr: d.Addr}).Run(t.Context(), "du", "--format", "{{json .}}")
	if err != nil {
		t.Fatalf("du: %v\n%s", err, out)
	}
	var records []struct{ Size int64 }
	if err := json.Unmarshal(out, &records); err != nil {
		t.Fatalf("du: %v\n%s", err, out)
	}
	var n int64
	for _, r := range records {
		n += r.Size
	}
	return n
}

// stored returns the bytes on disk of what the daemon keeps of lazy layers.
func stored(t *testing.T, d *daemon.Daemon) int64 {
	t.Helper()
	dirs, err := filepath.Glob(filepath.Join(d.Root, "runc-*", "snapshots", "store"))
	if err != nil || len(dirs) != 1 {
		t.Fatalf("stores below %s: %q, %v", d.Root, dirs, err)
	}
	var n int64
	if err := filepath.WalkDir(dirs[0], func(_ string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			n += st.Blocks * 512
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return n
}

// TestImageInAnotherRegistry loses the registry that an image was read from. A build that is FROM the same image in another one
// reads what is missing from there: of layers that are mounted, and after a restart also of those that the store has lost.
func TestImageInAnotherRegistry(t *testing.T) {
	m := newMidRUN(t)
	first, second := m.serve(t, registry.Options{}), m.serve(t, registry.Options{})
	opt := daemon.Options{Config: plainHTTP(first) + plainHTTP(second) + "[lazy]\nfetch-timeout = \"6s\"\n", Root: t.TempDir()}
	d := startDaemon(t, opt)
	reads := func(d *daemon.Daemon, reg *registry.Registry, i uint64) {
		t.Helper()
		res := build(t, d, client.Solve{Dockerfile: fmt.Sprintf("FROM %s\nRUN sha256sum /big/%d\n", reg.Ref(midRUNName), i)})
		wantContains(t, "output", res.Output(), digest.FromString(noise(i, 1<<20)).Encoded())
	}
	reads(d, first, 0)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	reads(d, second, 12)
	stopDaemon(t, d)
	stores, err := filepath.Glob(filepath.Join(opt.Root, "runc-*", "snapshots", "store"))
	if err != nil || len(stores) != 1 {
		t.Fatalf("stores: %q, %v", stores, err)
	}
	if err := os.RemoveAll(stores[0]); err != nil {
		t.Fatal(err)
	}
	reads(startDaemon(t, opt), second, 20)
}
