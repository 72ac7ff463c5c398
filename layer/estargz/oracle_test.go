package estargz_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	stargz "github.com/containerd/stargz-snapshotter/estargz"
	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
)

// writers are the ways in which an eStargz layer comes into the world, but for our own: see wantLayer.
var writers = map[string]writer{
	"built":                 build(),
	"built, chunks":         build(stargz.WithChunkSize(1000)),
	"built, min chunk":      build(stargz.WithChunkSize(1000), stargz.WithMinChunkSize(2500)),
	"built, one frame":      build(stargz.WithChunkSize(100), stargz.WithMinChunkSize(1<<30)),
	"built, one part":       build(stargz.WithParallelism(1)),
	"built, many parts":     build(stargz.WithParallelism(9), stargz.WithChunkSize(300)),
	"lossless":              lossless(0, 0),
	"lossless, chunks":      lossless(1000, 0),
	"lossless, tiny chunks": lossless(300, 0),
	"lossless, min chunk":   lossless(1000, 2500),
	"lossless, one frame":   lossless(0, 1<<30),
	"external TOC":          external,
	"legacy":                legacy,
}

// layers are contents that somebody might have an opinion on.
var layers = map[string][]layertest.Entry{
	"empty":       {},
	"only a root": {dir("./").Perm(0o1777).Owner(1, 2)},
	"usual": {
		dir("./"), dir("a/"), file("a/b", "content"), file("a/empty", ""), dir("a/c/"), file("a/c/d", strings.Repeat("0123456789", 333)),
		symlink("a/s", "../x"), file("z", strings.Repeat("z", 3000)), file("last", "x"),
	},
	"attributes": {
		dir("d/").Perm(0o2750).Owner(1000, 1000).Modified(1700000000), file("d/su", "x").Perm(0o4755).Modified(1),
		dir("tmp/").Perm(0o1777), file("zero", "").Perm(0).Owner(1<<31, 1<<31),
	},
	"xattrs": {
		file("ping", "elf").Xattr("security.capability", "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00").Xattr("user.é", "ü"),
		dir("d/").Xattr("user.a", "").Xattr("user.b", strings.Repeat("b", 3000)),
		file("t", "x").Xattr("trusted.overlay.opaque", "y"), symlink("l", "x").Xattr("user.a", "x"),
	},
	"nodes": {char("null", 1, 3), block("sda", 8, 0), fifo("p"), char("zero-zero", 0, 0), dir("dev/"), block("dev/big", 4095, 1048575)},
	"hardlinks": {
		file("a", "aaa"), link("b", "a"), dir("d/"), link("d/c", "b"), link("d/d", "/a"), symlink("s", "t"), file("x", "xx"), link("y", "./x"),
	},
	"whiteouts": {
		file(".wh.gone", ""), dir("d/"), file("d/.wh..wh..opq", ""), file("d/new", "x"), file("d/.wh.old", "").Owner(3, 4),
		file("e/.wh.f", ""), file("e/f", "x"), file("e/.wh.é", ""),
	},
	"implied": {file("a/b/c/d", "x"), file("a/b2/c", "y"), dir("a/b/"), file("./e//f", "z")},
	"odd names": {
		file("back\\slash", "x"), file("new\nline", "y"), file(" ", "z"), file("\"quoted\" <&>", "x"), file("世界", "y"), file("\U0001F600", "smile"),
		file(strings.Repeat("n", 255), "x"), file(strings.Repeat("d/", 500)+"f", "deep"), file("a..b", ""), file("...", ""), file("\u2028", ""),
		file("\x01\x1f\x7f", "control"),
	},
	"landmarks further down": {file("d/.prefetch.landmark", "x"), file("d/stargz.index.json", "{}")},
	"content": {
		file("sparse", strings.Repeat("\x00", 300_000)), file("one", "1"), file("k", strings.Repeat("k", 1000)), file("k+1", strings.Repeat("l", 1001)),
		file("3k", strings.Repeat("m", 3000)), file("e", ""), file("block", strings.Repeat("b", 4096)), file("block+1", strings.Repeat("c", 4097)),
	},
}

func TestOracle(t *testing.T) {
	for content, entries := range layers {
		for name, write := range writers {
			t.Run(content+"/"+name, func(t *testing.T) {
				compare(t, write(t, layertest.Tar(t, entries...)), entries)
			})
		}
	}
}

func TestOracleRandom(t *testing.T) {
	names := slices.Sorted(maps.Keys(writers))
	for seed := range layertest.Seeds(60) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 0))
			entries := layertest.Random(r, r.IntN(80))
			write := writers[names[int(seed)%len(names)]]
			compare(t, write(t, layertest.Tar(t, entries...)), entries)
		})
	}
}

func TestOraclePrioritized(t *testing.T) {
	entries := append(layers["usual"], layers["hardlinks"][1:2]...)
	entries = append(entries[:len(entries)-1], file("hl", "target"), link("hl2", "hl"))
	for name, opts := range map[string][]stargz.Option{
		"":           nil,
		", chunks":   {stargz.WithChunkSize(100)},
		", parallel": {stargz.WithChunkSize(100), stargz.WithParallelism(4)},
		", min":      {stargz.WithChunkSize(100), stargz.WithMinChunkSize(1000)},
	} {
		t.Run("prioritized"+name, func(t *testing.T) {
			b := build(append(opts, stargz.WithPrioritizedFiles([]string{"/z", "a/c/d", "hl2"}))...)(t, layertest.Tar(t, entries...))
			l := compare(t, b, entries)
			r, err := stargz.Open(b.reader())
			if err != nil {
				t.Fatal(err)
			}
			landmark, ok := r.Lookup(stargz.PrefetchLandmark)
			if !ok || landmark.Offset == 0 || l.Prefetch != landmark.Offset {
				t.Errorf("landmark at %d, want %+v", l.Prefetch, landmark)
			}
		})
	}
	t.Run("nothing", func(t *testing.T) {
		if l := compare(t, build()(t, layertest.Tar(t, entries...)), entries); l.Prefetch != 0 {
			t.Errorf("landmark at %d", l.Prefetch)
		}
		if l := compare(t, lossless(0, 0)(t, layertest.Tar(t, entries...)), entries); l.Prefetch != estargz.NoLandmark {
			t.Errorf("landmark at %d without one", l.Prefetch)
		}
	})
}

// compare opens a blob, and compares it with what stargz-snapshotter's reader sees in it and with the tar that
// it was made of.
func compare(t *testing.T, b blob, entries []layertest.Entry) *estargz.Blob {
	t.Helper()
	got, err := estargz.Open(b.reader(), int64(len(b.data)), estargz.Options{TOCDigest: b.tocDigest, ExternalTOC: b.toc})
	if err != nil {
		t.Fatal(err)
	}
	if got.TOCDigest != b.tocDigest {
		t.Errorf("TOC digest %s, want %s", got.TOCDigest, b.tocDigest)
	}
	layertest.Check(t, got.Layer)
	want := oracle(t, b)
	if tree := describe(got.Layer); !slices.Equal(tree, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(tree, "\n"), strings.Join(want, "\n"))
	}
	data := layertest.Fill(t, got.Layer, bytes.NewReader(b.data))
	files := 0
	for _, e := range entries {
		if e.Typeflag != tar.TypeReg || strings.HasPrefix(path.Base(e.Name), ".wh.") {
			continue
		}
		files++
		content, err := layertest.Content(got.Layer, data, path.Clean(e.Name))
		if err != nil {
			t.Error(err)
		} else if content != e.Content {
			t.Errorf("%s has %.40q…, want %.40q…", e.Name, content, e.Content)
		}
	}
	again, err := estargz.Parse(got.TOC, got.End, estargz.Options{TOCDigest: b.tocDigest})
	if err != nil {
		t.Error(err)
	} else if a, b := fmt.Sprintf("%+v", got), fmt.Sprintf("%+v", again); len(a) != len(b) {
		t.Errorf("parsed again:\n%s\n%s", a, b)
	}
	return got
}

// describe writes a layer down as oracle does.
func describe(l *layer.Layer) []string {
	var lines []string
	first := map[uint32]string{}
	var walk func(dir uint32, at string)
	walk = func(dir uint32, at string) {
		for _, e := range l.Inodes[dir].Entries {
			name := path.Join(at, e.Name)
			in := &l.Inodes[e.Inode]
			if _, ok := first[e.Inode]; !ok {
				first[e.Inode] = name
			}
			if in.IsWhiteout() {
				lines = append(lines, fmt.Sprintf("%q whiteout", name))
				continue
			}
			lines = append(lines, fmt.Sprintf("%q %o %d:%d size %d mtime %d links %d dev %d:%d -> %q xattrs %q =%q opaque %t", name, in.Mode, in.UID, in.GID,
				size(in), in.Mtime, in.Nlink, in.Major, in.Minor, in.Target, in.Xattrs, first[e.Inode], in.Opaque))
			walk(e.Inode, name)
		}
	}
	walk(layer.Root, "")
	return lines
}

// size is that of the oracle, which has none for symlinks.
func size(in *layer.Inode) int64 {
	if in.IsRegular() {
		return in.Size
	}
	return 0
}

// oracle writes down what stargz-snapshotter's reader sees. Whiteouts, which that leaves to its file system, are as
// fs/layer/node.go shows them.
func oracle(t *testing.T, b blob) []string {
	t.Helper()
	opts := []stargz.OpenOption{}
	if b.toc != nil {
		opts = append(opts, stargz.WithDecompressors(externalDecompressor(b.toc)))
	}
	r, err := stargz.Open(b.reader(), opts...)
	if err != nil {
		t.Fatal(err)
	}
	root, ok := r.Lookup("")
	if !ok {
		return nil // of an empty layer
	}
	var lines []string
	first := map[*stargz.TOCEntry]string{}
	var walk func(dir *stargz.TOCEntry, at string)
	walk = func(dir *stargz.TOCEntry, at string) {
		children := map[string]*stargz.TOCEntry{}
		dir.ForeachChild(func(base string, e *stargz.TOCEntry) bool {
			children[base] = e
			return true
		})
		for base := range maps.Clone(children) {
			hidden, ok := strings.CutPrefix(base, ".wh.")
			if !ok {
				continue
			}
			delete(children, base)
			if _, ok := children[hidden]; !ok && base != ".wh..wh..opq" {
				children[hidden] = nil
			}
		}
		for _, base := range slices.Sorted(maps.Keys(children)) {
			e, name := children[base], path.Join(at, base)
			if at == "" && slices.Contains([]string{stargz.PrefetchLandmark, stargz.NoPrefetchLandmark, stargz.TOCTarName}, base) {
				continue
			}
			if e == nil || e.Type == "char" && e.DevMajor == 0 && e.DevMinor == 0 {
				lines = append(lines, fmt.Sprintf("%q whiteout", name))
				continue
			}
			if _, ok := first[e]; !ok {
				first[e] = name
			}
			_, opaque := e.LookupChild(".wh..wh..opq")
			lines = append(lines, fmt.Sprintf("%q %o %d:%d size %d mtime %d links %d dev %d:%d -> %q xattrs %q =%q opaque %t", name, mode(t, e), e.UID, e.GID,
				e.Size, mtime(e), e.NumLink, e.DevMajor, e.DevMinor, e.LinkName, xattrs(e), first[e], opaque))
			walk(e, name)
		}
	}
	walk(root, "")
	return lines
}

func mtime(e *stargz.TOCEntry) int64 {
	if t := e.ModTime(); !t.Before(time.Unix(0, 0)) && !t.After(time.Unix(0, math.MaxInt64)) {
		return t.Unix()
	}
	return 0 // as containerd unpacks it
}

func mode(t *testing.T, e *stargz.TOCEntry) uint32 {
	t.Helper()
	if e.Type == "symlink" {
		return unix.S_IFLNK | 0o777
	}
	types := map[string]uint32{"dir": unix.S_IFDIR, "reg": unix.S_IFREG, "char": unix.S_IFCHR, "block": unix.S_IFBLK, "fifo": unix.S_IFIFO}
	if types[e.Type] == 0 {
		t.Fatalf("%s: type %s", e.Name, e.Type)
	}
	return types[e.Type] | uint32(e.Mode)&0o7777
}

// xattrs are those that containerd's applier wouldn't leave out.
func xattrs(e *stargz.TOCEntry) []layer.Xattr {
	var xs []layer.Xattr
	for _, name := range slices.Sorted(maps.Keys(e.Xattrs)) {
		if strings.HasPrefix(name, "trusted.") || strings.HasPrefix(name, "user.") && e.Type != "reg" && e.Type != "dir" {
			continue
		}
		xs = append(xs, layer.Xattr{Name: name, Value: e.Xattrs[name]})
	}
	return xs
}
