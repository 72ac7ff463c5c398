package order_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"testing"

	stargz "github.com/containerd/stargz-snapshotter/estargz"
	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/order"
)

var (
	dir     = layertest.Dir
	file    = layertest.File
	link    = layertest.Link
	symlink = layertest.Symlink
)

func parse(t testing.TB, list string) *order.List {
	t.Helper()
	l, err := order.Parse([]byte(list))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// ordered puts a tar in order, and looks whether anything is left on disk.
func ordered(t testing.TB, in []byte, list string) (out []byte, first int) {
	t.Helper()
	spool := t.TempDir()
	o, err := parse(t, list).Tar(t.Context(), bytes.NewReader(in), spool)
	if err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(spool); err != nil || len(left) > 0 {
		t.Errorf("there is %v, %v", left, err)
	}
	out, err = io.ReadAll(o)
	if err != nil {
		t.Fatal(err)
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	return out, o.First
}

// names are those of a tar's entries, with the contents of files.
func names(t testing.TB, in []byte) (names []string) {
	t.Helper()
	r := tar.NewReader(bytes.NewReader(in))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return names
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, strings.TrimRight(h.Name+" "+string(b), " "))
	}
}

const (
	here = ".prefetch.landmark \x0f"
	none = ".no.prefetch.landmark \x0f"
)

func TestTar(t *testing.T) {
	usual := []layertest.Entry{
		dir("a/"), file("a/1", "one"), file("a/2", "two"), dir("b/"), dir("b/c/"), file("b/c/3", "three"), symlink("s", "a/1"), file("z", ""),
	}
	global := layertest.Entry{Header: tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "g", PAXRecords: map[string]string{"comment": "x"}}}
	for name, c := range map[string]struct {
		in   []layertest.Entry
		list string
		want []string
	}{
		"order of the list": {usual, "z\na/2", []string{"z", "a/", "a/2 two", here, "a/1 one", "b/", "b/c/", "b/c/3 three", "s"}},
		"all parents":       {usual, "/b/c/3", []string{"b/", "b/c/", "b/c/3 three", here, "a/", "a/1 one", "a/2 two", "s", "z"}},
		"once":              {usual, "z\nz\n**/z\n./z", []string{"z", here, "a/", "a/1 one", "a/2 two", "b/", "b/c/", "b/c/3 three", "s"}},
		"a glob":            {usual, "**/[23]", []string{"a/", "a/2 two", "b/", "b/c/", "b/c/3 three", here, "a/1 one", "s", "z"}},
		"a directory":       {usual, "b/c/", []string{"b/", "b/c/", here, "a/", "a/1 one", "a/2 two", "b/c/3 three", "s", "z"}},
		"a symlink":         {usual, "s", []string{"s", here, "a/", "a/1 one", "a/2 two", "b/", "b/c/", "b/c/3 three", "z"}},
		"all of it":         {usual[:2], "**", []string{"a/", "a/1 one", here}},
		"none":              {usual[:2], "nothing\n**/*.so", []string{none, "a/", "a/1 one"}},
		"no entries":        {nil, "a", []string{none}},
		"root":              {[]layertest.Entry{dir("./"), file("./a", "1"), file("./b", "2")}, "b", []string{"./", "./b 2", here, "./a 1"}},
		"implied parents":   {[]layertest.Entry{file("a", "1"), file("b/c", "2")}, "b/c", []string{"b/c 2", here, "a 1"}},
		"odd names":         {[]layertest.Entry{file("a", "1"), file("/usr/bin/[", "2"), file("./x*", "3"), file("xy", "4")}, "usr/bin/[\nx*", []string{"/usr/bin/[ 2", "./x* 3", here, "a 1", "xy 4"}},
		"record, no glob":   {[]layertest.Entry{file("a", "1"), file("b", "2")}, `{"path":"b*"}`, []string{none, "a 1", "b 2"}},
		"hardlink":          {[]layertest.Entry{file("a", "1"), dir("d/"), file("d/t", "2"), link("l", "d/t"), link("l2", "l")}, "l2", []string{"d/", "d/t 2", "l", "l2", here, "a 1"}},
		"its target":        {[]layertest.Entry{file("a", "1"), file("t", "2"), link("l", "t")}, "t", []string{"t 2", here, "a 1", "l"}},
		"target elsewhere":  {[]layertest.Entry{file("a", "1"), link("l", "gone"), link("m", "m")}, "l\nm", []string{"l", "m", here, "a 1"}},
		"target behind":     {[]layertest.Entry{file("a", "1"), link("l", "t"), file("t", "2")}, "l", []string{"l", here, "a 1", "t 2"}},
		"the last counts":   {[]layertest.Entry{file("a", "1"), file("b", "2"), file("b", "3"), file("c", "4"), file("./b", "5")}, "b", []string{"b 2", "b 3", "./b 5", here, "a 1", "c 4"}},
		// To the first b, that is: it would become one to the last.
		"a link between": {[]layertest.Entry{file("a", "1"), file("b", "2"), link("l", "b"), file("b", "3")}, "b\nl", []string{none, "a 1", "b 2", "l", "b 3"}},
		"whiteouts": {
			[]layertest.Entry{file(".wh.d", ""), dir("d/"), file("d/.wh..wh..opq", ""), file("d/.wh.f", ""), file("d/a", "1"), file("d/f", "2"), file("d/.wh.a", "")}, "d/f\nd/a",
			[]string{".wh.d", "d/", "d/.wh..wh..opq", "d/.wh.f", "d/f 2", "d/a 1", here, "d/.wh.a"},
		},
		"whiteouts aren't files": {[]layertest.Entry{file("d/.wh.f", ""), file("d/g", "1")}, "d/*", []string{"d/g 1", here, "d/.wh.f"}},
		"other landmarks": {
			[]layertest.Entry{file("a", "1"), file("./"+here[:len(here)-2], "\x0f"), file("/"+none[:len(none)-2], "\x0f"), file("b", "2")}, "b",
			[]string{"b 2", here, "a 1"},
		},
		"only called so": {[]layertest.Entry{file("a", "1"), file(".prefetch.landmark", "x")}, "a", []string{"a 1", here, ".prefetch.landmark x"}},
		"global header":  {[]layertest.Entry{global, file("a", "1"), file("b", "2")}, "b", []string{"g", "b 2", here, "a 1"}},
	} {
		t.Run(name, func(t *testing.T) {
			in := layertest.Tar(t, c.in...)
			out, first := ordered(t, in, c.list)
			got := names(t, out)
			if !slices.Equal(got, c.want) {
				t.Errorf("got %q\nwant %q", got, c.want)
			}
			want := 0
			for _, n := range got[:max(slices.Index(got, here), 0)] {
				if n != "g" && !strings.HasSuffix(n, "/") { // nor is it a global header
					want++
				}
			}
			if first != want {
				t.Errorf("%d files are first, want %d", first, want)
			}
		})
	}
}

// Random tars unpack to the same trees, whatever is first in them, and what another list has done to them doesn't matter.
func TestRandom(t *testing.T) {
	for seed := range layertest.Seeds(150) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 7))
			entries := layertest.Random(r, r.IntN(100))
			in := layertest.Tar(t, entries...)
			one, another := randomList(r, entries), randomList(r, entries)
			want := tree(t, in)
			out, _ := ordered(t, in, one)
			if got := tree(t, out); !slices.Equal(got, want) {
				t.Errorf("ordered by\n%s\ngot %q\nwant %q", one, got, want)
			}
			again, _ := ordered(t, out, another)
			direct, _ := ordered(t, in, another)
			if !bytes.Equal(again, direct) {
				t.Errorf("by way of\n%s\ngot %q\nwant %q", one, names(t, again), names(t, direct))
			}
			if twice, _ := ordered(t, out, one); !bytes.Equal(twice, out) {
				t.Errorf("done twice: %q\nwant %q", names(t, twice), names(t, out))
			}
			wantSameEntries(t, in, out)
		})
	}
}

// randomList names some of a tar's entries, some twice, and has globs.
func randomList(r *rand.Rand, entries []layertest.Entry) string {
	list := []string{"n[a-c]*/**", "**/nX*"}[:r.IntN(3)]
	for _, e := range entries {
		if r.IntN(4) == 0 {
			list = append(list, strings.TrimSpace(strings.ReplaceAll(e.Name, "\n", "?")))
		}
	}
	r.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	return strings.Join(append(list, "nowhere"), "\n")
}

// tree is what our reader sees in a tar, when it is made a layer.
func tree(t *testing.T, in []byte) []string {
	t.Helper()
	var b bytes.Buffer
	if _, err := estargz.Write(t.Context(), &b, bytes.NewReader(in), estargz.WriteOptions{}); err != nil {
		t.Fatal(err)
	}
	l, err := estargz.Open(bytes.NewReader(b.Bytes()), int64(b.Len()), estargz.Options{})
	if err != nil {
		t.Fatal(err)
	}
	layertest.Check(t, l.Layer)
	return layertest.Tree(l.Layer)
}

// wantSameEntries looks whether each entry is there, with its headers as they were.
func wantSameEntries(t *testing.T, in, out []byte) {
	t.Helper()
	blocks := func(b []byte) map[string]int {
		n := map[string]int{}
		for p := range slices.Chunk(b, 512) {
			n[string(p)]++
		}
		return n
	}
	had := blocks(out)
	for p, n := range blocks(in) {
		if had[p] < n {
			t.Fatalf("a block is missing: %.100q", p)
		}
	}
}

// The order is that of stargz-snapshotter's own converter, where that one has tars that it gets right.
func TestAsUpstream(t *testing.T) {
	entries := []layertest.Entry{
		dir("./"), dir("a/"), file("a/1", "one"), dir("a/b/"), file("a/b/2", "two"), file("3", "three"), link("a/l", "3"), symlink("s", "3"), file("z", "end"),
	}
	in := layertest.Tar(t, entries...)
	for _, list := range [][]string{{"z", "a/b/2"}, {"a/l"}, {"/3", "./a/l", "a/1"}, {"s", "a"}, {"/", "a/b"}} {
		b, err := stargz.Build(io.NewSectionReader(bytes.NewReader(in), 0, int64(len(in))), stargz.WithPrioritizedFiles(list))
		if err != nil {
			t.Fatal(err)
		}
		blob, err := io.ReadAll(b)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		rc, err := stargz.Unpack(io.NewSectionReader(bytes.NewReader(blob), 0, int64(len(blob))), new(stargz.GzipDecompressor))
		if err != nil {
			t.Fatal(err)
		}
		theirs, err := io.ReadAll(rc)
		if err != nil {
			t.Fatal(err)
		}
		ours, _ := ordered(t, in, strings.Join(list, "\n"))
		if got, want := names(t, ours), names(t, theirs); !slices.Equal(got, want) {
			t.Errorf("%q: got %q\nwant %q", list, got, want)
		}
	}
}

// TestSparse has tars with sparse files stay as they are, and doesn't read through their holes.
func TestSparse(t *testing.T) {
	for version, in := range layertest.Sparse(t) {
		if out, first := ordered(t, in, "hole\nlast"); !bytes.Equal(out, in) || first != 0 {
			t.Errorf("%s: %d bytes of %d, of which %d files are first", version, len(out), len(in), first)
		}
	}
}

// TestHostile has tars that ask for more memory than there is, or stack. What no reader takes stays as it is, and what is unheard of where it is.
func TestHostile(t *testing.T) {
	var deep, links []layertest.Entry
	for i := range 300 {
		deep = append(deep, file(fmt.Sprint(i, "/")+strings.Repeat("a/", 2000)+"x", ""))
	}
	links = append(links, file("0", ""))
	for i := range 100_000 {
		links = append(links, link(fmt.Sprint(i+1), fmt.Sprint(i)))
	}
	long := strings.Repeat("a/", 20_000) + "x"
	for name, c := range map[string]struct {
		in    io.Reader
		list  string
		moves bool
	}{
		"a long name":    {bytes.NewReader(layertest.Tar(t, file("b/x", ""), file(long, ""))), "**/x", false},
		"a link to one":  {bytes.NewReader(layertest.Tar(t, file("b/x", ""), link("l", long))), "b/x", false},
		"many names":     {bytes.NewReader(bytes.Repeat(layertest.Tar(t, file("x", ""))[:512], layer.MaxEntries+1)), "x", false},
		"many parents":   {bytes.NewReader(layertest.Tar(t, deep...)), "**/x", true},
		"links to links": {bytes.NewReader(layertest.Tar(t, links...)), "100000", false},
		"some of these":  {bytes.NewReader(layertest.Tar(t, links[:5000]...)), "4999", true},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "many names" && testing.Short() {
				t.Skip("archive/tar takes 5 KB for each header under the race detector")
			}
			defer debug.SetMaxStack(debug.SetMaxStack(16 << 20))
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			o, err := parse(t, c.list).Tar(t.Context(), c.in, t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			defer o.Close()
			runtime.ReadMemStats(&after)
			if took := (after.TotalAlloc - before.TotalAlloc) >> 20; took > 512 {
				t.Errorf("took %d MB", took)
			}
			if (o.First > 0) != c.moves {
				t.Errorf("%d files are first, want any: %t", o.First, c.moves)
			}
		})
	}
}

// A record that isn't one, by chance or by malice, is none.
func TestRecords(t *testing.T) {
	for _, said := range []string{"0", "1,0,1", "0,0", "2,9", "-1,1", "x!,1", ","} {
		landmark := file(".prefetch.landmark", "\x0f")
		landmark.PAXRecords = map[string]string{"BUILDKITDLAZY.order": said}
		in := layertest.Tar(t, file("a", "1"), file("b", "2"), landmark, file("c", "3"))
		out, _ := ordered(t, in, "c")
		if got, want := names(t, out), []string{"c 3", here, "a 1", "b 2"}; !slices.Equal(got, want) {
			t.Errorf("%q: got %q", said, got)
		}
	}
}

// failing is a tar that ends with an error.
type failing struct {
	io.Reader
	err error
}

func (f *failing) Read(p []byte) (int, error) {
	n, err := f.Reader.Read(p)
	if errors.Is(err, io.EOF) {
		err = f.err
	}
	return n, err
}

func TestTarFails(t *testing.T) {
	in := layertest.Tar(t, file("a", strings.Repeat("x", 10_000)), file("b", strings.Repeat("y", 700)))
	broken := errors.New("broken")
	for name, c := range map[string]struct {
		in  io.Reader
		err error
	}{
		"in a header": {bytes.NewReader(in[:300]), io.ErrUnexpectedEOF},
		"in a file":   {bytes.NewReader(in[:5000]), io.ErrUnexpectedEOF},
		"in padding":  {bytes.NewReader(in[:len(in)-1024-200]), io.ErrUnexpectedEOF},
		"no tar":      {strings.NewReader(strings.Repeat("?", 2000)), tar.ErrHeader},
		"an error":    {&failing{bytes.NewReader(in[:6000]), broken}, broken},
		"at the end":  {&failing{bytes.NewReader(in), broken}, broken},
		"an error, 0": {&failing{bytes.NewReader(nil), broken}, broken},
	} {
		t.Run(name, func(t *testing.T) {
			spool := t.TempDir()
			_, err := parse(t, "b").Tar(t.Context(), c.in, spool)
			if !errors.Is(err, c.err) {
				t.Errorf("got %v, want %v", err, c.err)
			}
			if left, err := os.ReadDir(spool); err != nil || len(left) > 0 {
				t.Errorf("there is %v, %v", left, err)
			}
		})
	}
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(broken)
		if _, err := parse(t, "b").Tar(ctx, bytes.NewReader(in), t.TempDir()); !errors.Is(err, broken) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("no directory", func(t *testing.T) {
		if _, err := parse(t, "b").Tar(t.Context(), bytes.NewReader(in), filepath.Join(t.TempDir(), "x")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("got %v", err)
		}
	})
}

// A full disk is what the error says, be it found out in the middle or at the end.
func TestDiskFull(t *testing.T) {
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	limited := old
	limited.Cur = 100 << 10
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &limited); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
			t.Fatal(err)
		}
	}()
	for _, size := range []int{150 << 10, 2 << 20} {
		in := layertest.Tar(t, file("a", strings.Repeat("x", size)), file("b", ""))
		_, err := parse(t, "b").Tar(t.Context(), bytes.NewReader(in), t.TempDir())
		if !errors.Is(err, syscall.EFBIG) || !strings.Contains(err.Error(), "keep a layer's tar while its files are put in order") {
			t.Errorf("got %v", err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"/a\n#b\n**/c", `["a"]`, `{"path":"a"}{"path":"b"}`, "[ab]", "{a,b}"} {
		f.Add([]byte(s))
	}
	in := layertest.Tar(f, dir("a/"), file("a/b", "1"), link("c", "a/b"), file("[ab]", "2"))
	f.Fuzz(func(t *testing.T, list []byte) {
		l, err := order.Parse(list)
		if err != nil {
			return
		}
		o, err := l.Tar(t.Context(), bytes.NewReader(in), t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer o.Close()
		out, err := io.ReadAll(o)
		if err != nil {
			t.Fatal(err)
		}
		if n := len(names(t, out)); n != 5 {
			t.Errorf("%d entries", n)
		}
	})
}

func FuzzTar(f *testing.F) {
	f.Add(layertest.Tar(f, dir("a/"), file("a/b", "1"), link("c", "a/b"), file(".wh.x", "")))
	once, _ := ordered(f, layertest.Tar(f, file("a", "1"), file("b", "2"), file("c", "3")), "c\nb")
	f.Add(once)
	f.Fuzz(func(t *testing.T, in []byte) {
		o, err := parse(t, "c\na/*\n**").Tar(t.Context(), bytes.NewReader(in), t.TempDir())
		if err != nil {
			return
		}
		defer o.Close()
		if _, err := io.Copy(io.Discard, o); err != nil {
			t.Fatal(err)
		}
	})
}
