package integration

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// fileCapability is security.capability (struct vfs_cap_data, version 2) for
// cap_net_raw, permitted and effective.
const fileCapability = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// strange is an image with everything that a layer can hold.
func strange(t *testing.T) baseimage.Image {
	t.Helper()
	long := strings.Repeat("n", 250)
	return busybox(t,
		layer(t, "one",
			baseimage.Dir("s").Mode(0o1777), baseimage.Dir("s/setgid").Mode(0o2755).Owner(12, 34),
			baseimage.File("s/setuid", "#!/bin/sh\n").Mode(0o4755).Owner(1000, 1001),
			baseimage.File("s/none", "secret").Mode(0),
			baseimage.File("s/empty", ""),
			baseimage.File("s/zeros", strings.Repeat("\x00", 3<<20)+"end"),
			baseimage.File("s/chunks", noise(1, 9<<20+13)),
			baseimage.File("s/first", "many names\n"), baseimage.Hardlink("s/second", "s/first"), baseimage.Hardlink("s/setgid/third", "s/first"),
			baseimage.Symlink("s/dangling", "/does/not/exist"), baseimage.Symlink("s/relative", "setgid/third"),
			baseimage.Symlink("s/long", strings.Repeat("x/", 1000)),
			baseimage.File("s/attrs", "a").Xattr("user.one", "1").Xattr("user.binary", "\x00\xff\x01"),
			baseimage.File("s/capable", "c").Mode(0o755).Xattr("security.capability", fileCapability),
			baseimage.Dir("s/attrdir").Xattr("user.dir", "yes").Xattr("trusted.note", "t"),
			baseimage.Node("s/null", 'c', 1, 3), baseimage.Node("s/disk", 'b', 7, 200), baseimage.Node("s/fifo", 'p', 0, 0),
			baseimage.File("s/with space", "1"), baseimage.File("s/ümläut-日本-🎈", "2"), baseimage.File("s/quote'\"back\\slash", "3"),
			baseimage.File("s/new\nline\ttab", "4"), baseimage.File("s/-dash", "5"), baseimage.File("s/"+long, "6"),
			baseimage.File("s/..hidden", "7"), baseimage.File("s/percent%2F%s", "8"), baseimage.File("s/a.wh.b", "9"),
			baseimage.Dir("s/del"), baseimage.File("s/del/a", "a"), baseimage.File("s/del/b", "b"),
			baseimage.Dir("s/opaque"), baseimage.File("s/opaque/old", "old"), baseimage.Dir("s/opaque/olddir"), baseimage.File("s/opaque/olddir/x", "x"),
			baseimage.Dir("s/dir-to-file"), baseimage.File("s/dir-to-file/x", "x"), baseimage.File("s/file-to-dir", "f"),
			baseimage.File("s/replaced", "before"), baseimage.Dir("s/gone"), baseimage.File("s/gone/x", "x"),
		),
		layer(t, "nothing"),
		layer(t, "two",
			baseimage.Dir("s").Mode(0o1777),
			baseimage.Dir("s/del"), baseimage.Whiteout("s/del/a"), baseimage.Whiteout("s/second"), baseimage.Whiteout("s/gone"),
			baseimage.Dir("s/opaque").Mode(0o711), baseimage.Opaque("s/opaque"), baseimage.File("s/opaque/new", "new"),
			baseimage.Whiteout("s/dir-to-file"), baseimage.File("s/dir-to-file", "now a file"),
			baseimage.Dir("s/file-to-dir"), baseimage.File("s/file-to-dir/y", "y"),
			baseimage.File("s/replaced", "after"),
		),
		layer(t, "three",
			baseimage.Dir("s").Mode(0o1777), baseimage.Dir("s/opaque").Mode(0o711),
			baseimage.File("s/gone", "a file where a directory was"),
			baseimage.File("s/opaque/newer", "newer"), baseimage.Whiteout("s/none"),
		),
	)
}

// treestat builds the program that looks at trees, once.
var treestat = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "treestat-")
	if err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-o", filepath.Join(dir, "treestat"), "./lab/treestat")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build ./lab/treestat: %w\n%s", err, out)
	}
	return dir, nil
})

// tree runs treestat in a build step on an image and returns what it saw, by path.
func tree(t *testing.T, d *daemon.Daemon, from string) map[string]string {
	t.Helper()
	dir, err := treestat()
	if err != nil {
		t.Fatal(err)
	}
	res := build(t, d, client.Solve{
		Context: dir,
		// The listing leaves as a file: a step's log is limited and clipped.
		Dockerfile: "FROM " + from + ` AS look
RUN --mount=type=bind,target=/tools --mount=type=tmpfs,target=/run ["/bin/sh", "-c", "/tools/treestat -/tools -/run -/etc/resolv.conf -/etc/hosts -/listing / > /run/l && cp /run/l /listing"]
FROM scratch
COPY --from=look /listing /
`,
		Outputs: []string{"type=local,dest=" + dir + "/" + filepath.Base(d.Root) + fmt.Sprint(d.Pid())},
	})
	_ = res
	raw, err := os.ReadFile(filepath.Join(dir, filepath.Base(d.Root)+fmt.Sprint(d.Pid()), "listing"))
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]string{}
	for line := range strings.Lines(string(raw)) {
		var e struct {
			Path string `json:"path"`
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("treestat said %q: %v", line, err)
		}
		if e.Path != "/" && e.Path != "/etc" { // the step's mount points change their times
			seen[e.Path] = strings.TrimSpace(line)
		}
	}
	return seen
}

// wantSameTree compares two trees entry by entry.
func wantSameTree(t *testing.T, got, want map[string]string) {
	t.Helper()
	for _, path := range slices.Sorted(maps.Keys(want)) {
		switch g, ok := got[path]; {
		case !ok:
			t.Errorf("%q is missing", path)
		case g != want[path]:
			t.Errorf("%q differs:\n got %s\nwant %s", path, g, want[path])
		}
	}
	for _, path := range slices.Sorted(maps.Keys(got)) {
		if _, ok := want[path]; !ok {
			t.Errorf("%q should not be there: %s", path, got[path])
		}
	}
}

// TestLazyTreeIsTheEagerTree compares what a step sees of lazy layers, in every mixture of formats, with what it sees
// when stock BuildKit has unpacked the same tar files: types, modes, owners, times, links, devices,
// attributes, contents.
func TestLazyTreeIsTheEagerTree(t *testing.T) { eachDoor(t, testLazyTreeIsTheEagerTree) }

func testLazyTreeIsTheEagerTree(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	im := strange(t)
	push(t, reg, "strange:gzip", im, baseimage.Gzip)
	stock := startDaemon(t, daemon.Options{Kind: daemon.StockOverlay, Config: plainHTTP(reg)})
	want := tree(t, stock, reg.Ref("strange:gzip"))
	for _, must := range []string{"/s/setuid", "/s/new\nline\ttab", "/s/opaque/new", "/s/gone"} {
		if want[must] == "" {
			t.Fatalf("stock does not see %q: the image is not what it should be", must)
		}
	}
	for _, must := range []string{"/s/opaque/old", "/s/del/a", "/s/second"} {
		if want[must] != "" {
			t.Fatalf("stock sees %q: the image is not what it should be", must)
		}
	}

	e, g, z, p, s := baseimage.EStargz, baseimage.Gzip, baseimage.Zstd, baseimage.ZstdChunked, baseimage.StargzChunked
	for _, c := range []struct {
		name    string
		formats []baseimage.Format
		lazy    int
		flag    string
	}{
		{"all lazy", []baseimage.Format{e, e, e, e, e}, 5, ""},
		{"lazy above gzip", []baseimage.Format{g, e, e, e, e}, 4, ""},
		{"gzip above lazy", []baseimage.Format{e, e, g, g, g}, 2, ""},
		{"every other", []baseimage.Format{e, z, e, g, e}, 3, ""},
		{"zstd", []baseimage.Format{z, z, z, z, z}, 0, ""},
		{"zstd:chunked", []baseimage.Format{p, p, p, p, p}, 5, ""},
		{"both zstd:chunked, and eStargz", []baseimage.Format{p, s, e, s, p}, 5, ""},
		{"lazy but off", []baseimage.Format{e, e, e, e, e}, 0, "--lazy-mount=off"},
	} {
		t.Run(c.name, func(t *testing.T) {
			tag := "strange:" + strings.NewReplacer(" ", "-", ":", "-", ",", "").Replace(c.name)
			push(t, reg, tag, im, c.formats...)
			opt := daemon.Options{Config: plainHTTP(reg)}
			if c.flag != "" {
				opt.Args = append(opt.Args, c.flag)
			}
			d := startDaemon(t, opt)
			wantSameTree(t, tree(t, d, reg.Ref(tag)), want)
			// A second image of the same daemon finds its layers there.
			res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref(tag) + "\nRUN echo again\n"})
			if rep := reportOf(t, res); rep.Images[0].Lazy != c.lazy || len(rep.Images[0].Layers) != 5 {
				t.Errorf("%d of %d layers are lazy, want %d of 5", rep.Images[0].Lazy, len(rep.Images[0].Layers), c.lazy)
			}
		})
	}
}

// TestNanosecondTimes has layers whose times aren't whole seconds, in the formats that can say so: Podman's zstd:chunked, and what this
// daemon exports. A step sees of the lazy layers what it sees when stock BuildKit has unpacked the same tar.
func TestNanosecondTimes(t *testing.T) { eachDoor(t, testNanosecondTimes) }

func testNanosecondTimes(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	at := func(e baseimage.Entry, sec, nsec int64) baseimage.Entry {
		e.Header.ModTime = time.Unix(sec, nsec)
		return e
	}
	im := busybox(t, layer(t, "times",
		at(baseimage.Dir("s"), 1_700_000_000, 123_456_789), at(baseimage.File("s/file", "f"), 1_700_000_001, 999_999_999),
		at(baseimage.File("s/one", "f"), 1_700_000_002, 1), at(baseimage.File("s/late", "f"), 1<<33, 500_000_000),
		at(baseimage.File("s/empty", ""), 1_700_000_003, 100), at(baseimage.Symlink("s/link", "file"), 1_700_000_004, 5),
		at(baseimage.Node("s/fifo", 'p', 0, 0), 1_700_000_005, 6), at(baseimage.Node("s/null", 'c', 1, 3), 1_700_000_006, 7),
		at(baseimage.Dir("s/dir"), 1_700_000_007, 8), at(baseimage.File("s/dir/whole", "f"), 1_700_000_008, 0),
		at(baseimage.File("s/names", "many"), 1_700_000_009, 10), at(baseimage.Hardlink("s/dir/more", "s/names"), 1_700_000_009, 10),
		// containerd unpacks these as of 1970.
		at(baseimage.File("s/early", "f"), -1_000_000, 500_000_000), at(baseimage.File("s/too late", "f"), 1<<34, 0),
	))
	push(t, reg, "times:gzip", im, baseimage.Gzip)
	stock := startDaemon(t, daemon.Options{Kind: daemon.StockOverlay, Config: plainHTTP(reg)})
	want := tree(t, stock, reg.Ref("times:gzip"))
	wantContains(t, "what stock sees", want["/s/file"], "1700000001.999999999")

	push(t, reg, "times:podman", im, baseimage.ZstdChunked)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	tags := []string{"times:podman"}
	for _, compression := range []string{"estargz", "zstdchunked"} {
		tag := "times:" + compression
		build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("times:gzip") + "\n",
			Outputs: []string{"type=image,push=true,registry.insecure=true,force-compression=true,compression=" + compression + ",name=" + reg.Ref(tag)}})
		tags = append(tags, tag)
	}
	for _, tag := range tags {
		t.Run(tag, func(t *testing.T) {
			d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
			wantSameTree(t, tree(t, d, reg.Ref(tag)), want)
			res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref(tag) + "\nRUN true\n"})
			if rep := reportOf(t, res); rep.Images[0].Lazy != 2 {
				t.Errorf("%d layers are lazy, want 2", rep.Images[0].Lazy)
			}
		})
	}
}

// TestImplicitParents has layers whose tar files leave out parent directories: those of lower
// layers keep their mode and owner.
func TestImplicitParents(t *testing.T) { eachDoor(t, testImplicitParents) }

func testImplicitParents(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	push(t, reg, "implicit:1", busybox(t,
		layer(t, "lower", baseimage.Dir("p").Mode(0o1777).Owner(5, 6), baseimage.Dir("p/q").Mode(0o700).Owner(7, 8)),
		layer(t, "upper", baseimage.File("p/q/f", "f"), baseimage.File("new/parents/f", "f")),
	), baseimage.EStargz)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("implicit:1") + "\nRUN stat -c '%n %a %u %g' /p /p/q /new /new/parents && cat /p/q/f\n"})
	wantContains(t, "output", res.Output(), "/p 1777 5 6\n", "/p/q 700 7 8\n", "/new 755 0 0\n", "/new/parents 755 0 0\n")
}

// TestFileCapabilityWorks uses a file capability that comes from a lazy layer, and a hardlink's identity.
func TestFileCapabilityWorks(t *testing.T) { eachDoor(t, testFileCapabilityWorks) }

func testFileCapabilityWorks(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	bb, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	// A capability for cap_chown: an ordinary user who runs this copy may change owners.
	const chown = "\x01\x00\x00\x02\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	push(t, reg, "caps:1", busybox(t, layer(t, "caps",
		baseimage.Dir("c"), baseimage.File("c/busybox", string(bb)).Mode(0o755).Xattr("security.capability", chown),
	)), baseimage.EStargz)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("caps:1") + `
RUN echo x > /c/f && chown 65534 /c
USER 65534
RUN /bin/busybox chown 1 /c/f 2>/dev/null || echo plain copy may not
RUN /c/busybox chown 1 /c/f && echo capable copy may
`})
	wantContains(t, "output", res.Output(), "plain copy may not", "capable copy may")
}

// TestMultiPlatformIndex builds from an index: for the daemon's platform, and by copying from another's.
func TestMultiPlatformIndex(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	here := busybox(t, layer(t, "here", baseimage.File("which", "here")))
	other := baseimage.Image{
		Layers:   []baseimage.Layer{layer(t, "other", baseimage.File("which", "other"), baseimage.File("large", noise(5, 4<<20)))},
		Platform: v1.Platform{OS: "linux", Architecture: "s390x"},
	}
	var adds []mutate.IndexAddendum
	for _, im := range []baseimage.Image{other, here} {
		img, err := im.Build(t.Context(), baseimage.EStargz)
		if err != nil {
			t.Fatal(err)
		}
		cf, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		adds = append(adds, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: cf.Platform()}})
	}
	index := mutate.IndexMediaType(mutate.AppendManifests(empty.Index, adds...), types.OCIImageIndex)
	if _, err := baseimage.Push(t.Context(), reg, "multi:1", index); err != nil {
		t.Fatal(err)
	}
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	out := t.TempDir()
	res := build(t, d, client.Solve{
		Dockerfile: "FROM --platform=linux/s390x " + reg.Ref("multi:1") + " AS other\nFROM " + reg.Ref("multi:1") + " AS here\n" +
			"RUN cat /which\nCOPY --from=other /which /from-other\nFROM scratch\nCOPY --from=here /which /from-other /\n",
		Outputs: []string{"type=local,dest=" + out},
	})
	for file, want := range map[string]string{"which": "here", "from-other": "other"} {
		if got, err := os.ReadFile(filepath.Join(out, file)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v; want %q", file, got, err, want)
		}
	}
	if rep := reportOf(t, res); len(rep.Images) != 2 {
		t.Errorf("lazy.report has %d images, want one per platform: %+v", len(rep.Images), rep)
	}
}

// TestByDigest builds from an image named by digest, and by tag and digest.
func TestByDigest(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	img, dgst := push(t, reg, "base:1", busybox(t, bigLayer(t, 16<<20)), baseimage.EStargz)
	reg.Log.Reset()
	for _, ref := range []string{reg.Ref("base@" + dgst.String()), reg.Ref("base:1@" + dgst.String())} {
		d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
		res := build(t, d, client.Solve{Dockerfile: "FROM " + ref + "\nRUN sha256sum /big/1\n"})
		wantContains(t, "output", res.Output(), digest.FromString(noise(1, 1<<20)).Encoded())
		if rep := reportOf(t, res); rep.Images[0].Lazy != 2 {
			t.Errorf("%s: %d lazy layers, want 2", ref, rep.Images[0].Lazy)
		}
	}
	if read, size := blobsRead(t, reg, img), imageSize(t, img); read > size {
		t.Errorf("two lazy builds fetched %d bytes of an image of %d", read, size)
	}
}

// ociLayout writes an image to an OCI layout of its own, and returns its directory.
func ociLayout(t *testing.T, img v1.Image) (dir string) {
	t.Helper()
	dir = t.TempDir()
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := path.AppendImage(img); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestOCILayoutContext builds from an OCI layout of the client's disk. Its layers are unpacked, and a step sees as little
// of their format as it would if they were lazy.
func TestOCILayoutContext(t *testing.T) {
	img, err := busybox(t, bigLayer(t, 2<<20)).Build(t.Context(), baseimage.EStargz)
	if err != nil {
		t.Fatal(err)
	}
	dir := ociLayout(t, img)
	dgst, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	d := startDaemon(t, daemon.Options{})
	res := build(t, d, client.Solve{
		Dockerfile: "FROM base\nRUN sha256sum /big/1 && ls -A /\n",
		OCILayouts: []string{"store=" + dir},
		Args:       []string{"--opt=context:base=oci-layout://store@" + dgst.String()},
	})
	out := res.Output()
	wantContains(t, "output", out, digest.FromString(noise(1, 1<<20)).Encoded(), "big\nbin\n")
	if strings.Contains(out, "stargz") || strings.Contains(out, "landmark") {
		t.Errorf("a step sees files of the layers' format:\n%s", out)
	}
	rep := reportOf(t, res)
	for _, l := range rep.Images[0].Layers {
		if l.Mode != "lazy" && l.Reason == "" {
			t.Errorf("layer %s is %s without a reason", l.Digest, l.Mode)
		}
	}
}

// TestOCILayoutOfAMountedImage builds from an OCI layout whose layers are mounted from a registry, and from nowhere else: what is missing is read there.
func TestOCILayoutOfAMountedImage(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	img, dgst := push(t, reg, "base:1", busybox(t, bigLayer(t, 16<<20)), baseimage.EStargz)
	dir := ociLayout(t, img)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg) + "[lazy]\nfetch-timeout = \"6s\"\n"})
	reads := func(from string, i uint64, more client.Solve) {
		t.Helper()
		more.Dockerfile = fmt.Sprintf("FROM %s\nRUN sha256sum /big/%d\n", from, i)
		reg.Log.Reset()
		res := build(t, d, more)
		wantContains(t, "output", res.Output(), digest.FromString(noise(i, 1<<20)).Encoded())
		if blobsRead(t, reg, img) == 0 {
			t.Errorf("nothing was read from the registry for a step from %s", from)
		}
	}
	reads(reg.Ref("base:1"), 0, client.Solve{})
	reads("base", 12, client.Solve{OCILayouts: []string{"store=" + dir}, Args: []string{"--opt=context:base=oci-layout://store@" + dgst.String()}})
	reads(reg.Ref("base:1"), 15, client.Solve{})
}

// TestManyLayers has more layers than a label can name.
func TestManyLayers(t *testing.T) { eachDoor(t, testManyLayers) }

func testManyLayers(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	var layers []baseimage.Layer
	for i := range 60 {
		layers = append(layers, layer(t, fmt.Sprintf("l%d", i), baseimage.File(fmt.Sprintf("many/%d", i), fmt.Sprint(i)), baseimage.File("many/last", fmt.Sprint(i))))
	}
	push(t, reg, "many:1", busybox(t, layers...), baseimage.EStargz)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("many:1") + "\nRUN ls /many | wc -l && echo last=$(cat /many/last) first=$(cat /many/0)\n"})
	wantContains(t, "output", res.Output(), "61\n", "last=59 first=0")
	if rep := reportOf(t, res); rep.Images[0].Lazy != 61 {
		t.Errorf("%d lazy layers, want 61", rep.Images[0].Lazy)
	}
}

// TestSharedLayers builds on two images that share layers: they are fetched once.
func TestSharedLayers(t *testing.T) { eachDoor(t, testSharedLayers) }

func testSharedLayers(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	big := bigLayer(t, 8<<20)
	img, _ := push(t, reg, "one:1", busybox(t, big), baseimage.EStargz)
	push(t, reg, "two:1", busybox(t, big, layer(t, "top", baseimage.File("top", "t"))), baseimage.EStargz)
	d := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("one:1") + "\nRUN sha256sum /big/1\n"})
	reg.Log.Reset()
	res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref("two:1") + "\nRUN sha256sum /big/1 /top\n"})
	wantContains(t, "output", res.Output(), digest.FromString(noise(1, 1<<20)).Encoded())
	if read := blobsRead(t, reg, img); read > 0 {
		t.Errorf("%d bytes of shared layers were fetched again", read)
	}
}
