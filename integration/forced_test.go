package integration

import (
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// forced is a build that reads a part of a lazy base and converts all of it.
func forced(reg *registry.Registry, tag, attrs string) client.Solve {
	return client.Solve{
		Dockerfile: "FROM " + reg.Ref("base:1") + "\nRUN sha256sum /big/1 > /sum\n",
		Outputs:    []string{"type=image,push=true,oci-mediatypes=true,force-compression=true,name=" + reg.Ref(tag) + attrs},
	}
}

// TestForcedStreams converts a lazy base: its blobs are read once, and don't get into the content store; what becomes of them is what becomes of
// blobs that are there. It's found again, also after a restart, and goes with the layer.
func TestForcedStreams(t *testing.T) { eachDoor(t, testForcedStreams) }

func testForcedStreams(t *testing.T) {
	for base, targets := range map[baseimage.Format][]string{
		baseimage.EStargz:       {",compression=zstdchunked", ",compression=zstd", ",compression=uncompressed"},
		baseimage.StargzChunked: {",compression=estargz", ",compression=gzip"},
	} {
		t.Run(string(base), func(t *testing.T) {
			reg := startRegistry(t, registry.Options{})
			img, _ := push(t, reg, "base:1", busybox(t, bigLayer(t, 16<<20)), base)
			layers := layerDigests(t, img)
			opt := daemon.Options{Config: plainHTTP(reg), Root: t.TempDir()}
			d := startDaemon(t, opt)
			build(t, d, client.Solve{Dockerfile: forced(reg, "app:0", "").Dockerfile})
			made := map[string][]digest.Digest{}
			for _, attrs := range targets {
				reg.Log.Reset()
				res := build(t, d, forced(reg, "app:1", attrs))
				sent := reg.Log.BlobBytes()
				for i, l := range layers {
					size := sizeOf(t, img, l)
					if sent[l] < size || sent[l] > size+1<<10 { // the end, to see where the table of contents is
						t.Errorf("%s: base layer %d: %d bytes of %d were fetched", attrs, i, sent[l], size)
					}
				}
				wantContains(t, "progress", statuses(res), "converting layer "+layers[1].String())
				wantNotStored(t, d, layers...)
				made[attrs] = layerDigests(t, pull(t, reg, "app:1"))

				local := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
				fetches := forced(reg, "local:1", "")
				fetches.Outputs = []string{"type=oci,dest=" + filepath.Join(t.TempDir(), "oci.tar")}
				build(t, local, fetches) // has the base in the content store from then on
				build(t, local, forced(reg, "local:1", attrs))
				if want := layerDigests(t, pull(t, reg, "local:1")); !slices.Equal(made[attrs][:2], want[:2]) {
					t.Errorf("%s: layers %v, out of the content store %v", attrs, made[attrs], want)
				}
			}
			again := func() {
				t.Helper()
				for _, attrs := range targets {
					reg.Log.Reset()
					build(t, d, forced(reg, "app:2", attrs))
					if n := blobsRead(t, reg, img); n > 0 {
						t.Errorf("%s: %d bytes of the base were fetched again", attrs, n)
					}
					if got := layerDigests(t, pull(t, reg, "app:2")); !slices.Equal(got, made[attrs]) {
						t.Errorf("%s: layers %v, before %v", attrs, got, made[attrs])
					}
				}
				wantNotStored(t, d, layers...)
			}
			again()
			if used, most := usedBy(t, d), int64(len(targets)*16<<20); used < most {
				t.Errorf("du shows %d bytes, what the base has become takes %d", used, most)
			}
			stopDaemon(t, d)
			d = startDaemon(t, opt)
			again()
			if out, err := (client.Buildctl{Addr: d.Addr}).Run(t.Context(), "prune", "--all"); err != nil {
				t.Fatalf("prune: %v\n%s", err, out)
			}
			for _, attrs := range targets {
				wantNotStored(t, d, made[attrs]...)
			}
		})
	}
}

// TestForcedTakesWhatIsThere converts a base of Podman's of which steps have read a part: what they have isn't fetched again, through which door and in
// which daemon's life they may have. What becomes of it is what becomes of its blob.
func TestForcedTakesWhatIsThere(t *testing.T) { eachDoor(t, testForcedTakesWhatIsThere) }

func testForcedTakesWhatIsThere(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	img, _ := push(t, reg, "base:1", busybox(t, bigLayer(t, 16<<20)), baseimage.ZstdChunked)
	layers := layerDigests(t, img)
	big := layers[1]
	opt := daemon.Options{Config: plainHTTP(reg) + "[lazy]\nbackground-fetch = false\n", Root: t.TempDir()}
	d := startDaemon(t, opt)
	local := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	export := func(d *daemon.Daemon, tag, attrs, reads string) []digest.Digest {
		t.Helper()
		s := forced(reg, tag, attrs)
		s.Dockerfile = "FROM " + reg.Ref("base:1") + "\nRUN cat " + reads + " | sha256sum > /sum\n"
		if attrs == "" {
			s.Outputs = []string{"type=oci,dest=" + filepath.Join(t.TempDir(), "oci.tar")} // which has the base in the content store
		}
		build(t, d, s)
		if attrs == "" {
			return nil
		}
		return layerDigests(t, pull(t, reg, tag))
	}
	for _, c := range []struct {
		attrs, reads string
		restart      bool
		least, most  int64 // MiB of the layer that are fetched, all in all
	}{
		{",compression=gzip", "/big/1 /big/3 /big/5 /big/7 /big/8 /big/9 /big/10 /big/11", false, 16, 17},
		{",compression=estargz", "/big/1 /big/3 /big/5 /big/7 /big/8 /big/9 /big/10 /big/11", true, 8, 9},
		{",compression=estargz,compression-level=1", "/big/*", false, 8, 9}, // what was fetched for an export isn't kept
		{",compression=estargz,compression-level=2", "/big/*", true, 0, 1},
	} {
		if c.restart {
			stopDaemon(t, d)
			d = startDaemon(t, opt)
		}
		reg.Log.Reset()
		got := export(d, "app:1", c.attrs, c.reads)
		if n := reg.Log.BlobBytes()[big]; n < c.least<<20 || n > c.most<<20 {
			t.Errorf("%s: %d bytes were fetched, want %d to %d MiB", c.attrs, n, c.least, c.most)
		}
		wantNotStored(t, d, layers...)
		export(local, "local:1", "", c.reads)
		if want := export(local, "local:1", c.attrs, c.reads); !slices.Equal(got[:2], want[:2]) {
			t.Errorf("%s: layers %v, out of the content store %v", c.attrs, got, want)
		}
	}
}

// TestForcedTakesLargeFiles converts a base of eStargz of which steps have read a large file: what is inside of that isn't fetched again.
func TestForcedTakesLargeFiles(t *testing.T) { eachDoor(t, testForcedTakesLargeFiles) }

func testForcedTakesLargeFiles(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	large := layer(t, "large", baseimage.Dir("large"), baseimage.File("large/a", noise(1, 5<<20)), baseimage.File("large/b", noise(2, 17<<20)), baseimage.File("large/c", "c"))
	img, _ := push(t, reg, "base:1", busybox(t, large), baseimage.EStargz)
	layers := layerDigests(t, img)
	opt := daemon.Options{Config: plainHTTP(reg) + "[lazy]\nbackground-fetch = false\n", Root: t.TempDir()}
	d := startDaemon(t, opt)
	df := "FROM " + reg.Ref("base:1") + "\nRUN sha256sum /large/b > /sum\n"
	build(t, d, client.Solve{Dockerfile: df})
	local := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	build(t, local, client.Solve{Dockerfile: df, Outputs: []string{"type=oci,dest=" + filepath.Join(t.TempDir(), "oci.tar")}})
	for _, target := range []string{"zstd", "zstdchunked"} {
		export := func(d *daemon.Daemon, tag string) []digest.Digest {
			t.Helper()
			build(t, d, client.Solve{Dockerfile: df, Outputs: []string{
				"type=image,push=true,oci-mediatypes=true,force-compression=true,compression=" + target + ",name=" + reg.Ref(tag),
			}})
			return layerDigests(t, pull(t, reg, tag))
		}
		reg.Log.Reset()
		got := export(d, "app:1")
		if n, most := reg.Log.BlobBytes()[layers[1]], sizeOf(t, img, layers[1])-16<<20; n > most || n < 2<<20-100<<10 {
			t.Errorf("%s: %d bytes were fetched, want the last MiB of two files to %d bytes", target, n, most)
		}
		wantNotStored(t, d, layers...)
		if want := export(local, "local:1"); !slices.Equal(got[:2], want[:2]) {
			t.Errorf("%s: layers %v, out of the content store %v", target, got, want)
		}
		stopDaemon(t, d)
		d = startDaemon(t, opt)
	}
}

// TestForcedTogether converts a base for two builds at the same time, of which it is read once.
func TestForcedTogether(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	img, _ := push(t, reg, "base:1", busybox(t, bigLayer(t, 16<<20)), baseimage.EStargz)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	build(t, d, client.Solve{Dockerfile: forced(reg, "app:0", "").Dockerfile})
	reg.Log.Reset()
	var wg sync.WaitGroup
	for _, tag := range []string{"app:1", "app:2", "app:3"} {
		wg.Go(func() { build(t, d, forced(reg, tag, ",compression=zstdchunked")) })
	}
	wg.Wait()
	big := layerDigests(t, img)[1]
	if n, size := reg.Log.BlobBytes()[big], sizeOf(t, img, big); n > size+size/10 {
		t.Errorf("%d bytes of %d were fetched", n, size)
	}
	for _, tag := range []string{"app:2", "app:3"} {
		if got, want := layerDigests(t, pull(t, reg, tag)), layerDigests(t, pull(t, reg, "app:1")); !slices.Equal(got, want) {
			t.Errorf("%s has %v, app:1 %v", tag, got, want)
		}
	}
}

// TestForcedWithFaults has the registry fail while a base is converted.
func TestForcedWithFaults(t *testing.T) {
	for name, c := range streamFaults(2) {
		for base, target := range map[baseimage.Format]string{baseimage.EStargz: ",compression=zstdchunked", baseimage.ZstdChunked: ",compression=estargz"} {
			t.Run(name+" "+string(base), func(t *testing.T) {
				t.Parallel()
				reg := startRegistry(t, registry.Options{})
				img, _ := push(t, reg, "base:1", busybox(t, bigLayer(t, 16<<20)), base)
				d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
				build(t, d, client.Solve{Dockerfile: forced(reg, "app:0", "").Dockerfile})
				big := layerDigests(t, img)[1]
				fault := c.fault
				fault.Match = registry.MatchBlob(big)
				remove := reg.Faults.Add(fault)
				s := forced(reg, "app:1", target)
				if !c.err {
					build(t, d, s)
					if reg.Faults.Hits() == 0 {
						t.Error("no request was hit")
					}
				} else {
					wantContains(t, "error", buildFails(t, d, s), big.String())
					wantNotStored(t, d, big)
					remove()
					build(t, d, s)
				}
				if converted := pull(t, reg, "app:1"); base == baseimage.EStargz {
					wantZstdChunked(t, converted, 0)
				} else {
					wantEStargz(t, converted)
				}
				wantNotStored(t, d, big)
			})
		}
	}
}
