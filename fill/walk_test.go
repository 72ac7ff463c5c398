package fill

import (
	"crypto/sha256"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// treeWith makes a layer of files by their names, and of empty ones, which whiteouts are.
func treeWith(t *testing.T, s *Scheduler, empty []string, names ...string) *Filler {
	t.Helper()
	b := layer.NewBuilder(layer.BuilderOptions{})
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range empty {
		check(b.Add(name, layer.Inode{Mode: unix.S_IFREG | 0o644}))
	}
	for i, name := range names {
		check(b.Add(name, layer.Inode{Mode: unix.S_IFREG | 0o644, Size: 1}))
		check(b.Frame(int64(i)))
		check(b.Chunk(0, 1, 0, sha256.Sum256(nil)))
	}
	l, err := b.Build(int64(len(names)), gzipCodec{})
	check(err)
	im := &image{Layer: l}
	return s.Open(l, dsl().serve(im), newMemory(im), LayerOptions{})
}

// A walk goes where readdir of an overlay of the same layers leads.
func TestWalkIsInTheOrderOfOverlayfs(t *testing.T) {
	s := NewScheduler(SchedulerOptions{})
	defer s.Close()
	low := treeWith(t, s, []string{"usr/empty"}, "usr/a/1", "usr/a/3", "usr/b/1", "usr/gone/x", "usr/o/old", "usr/z")
	mid := treeWith(t, s, []string{"usr/.wh.gone", "usr/o/.wh..wh..opq"}, "usr/a/2", "usr/c/1", "usr/o/new")
	top := treeWith(t, s, nil, "usr/a/0", "usr/a/3", "usr/b")
	names := map[*Filler]string{low: "low ", mid: "mid ", top: "top "}
	frame := func(f *Filler, name string) int {
		i, err := f.layer.Lookup(name)
		if err != nil {
			t.Fatal(err)
		}
		return int(f.layer.Chunks[f.layer.Inode(i).FirstChunk].Frame)
	}
	w := &walk{layers: view{top, mid, low}, lists: &listings{}}
	follow := func() (files []string) {
		for file, ok := w.next(); ok; file, ok = w.next() {
			name, _ := file.f.layer.Path(file.inode)
			files = append(files, names[file.f]+name)
		}
		return files
	}
	all := []string{"low usr/a/1", "top usr/a/3", "top usr/a/0", "mid usr/a/2", "top usr/b", "mid usr/o/new", "low usr/z", "mid usr/c/1"}
	for i, at := range []int{frame(low, "usr/a/1"), frame(top, "usr/a/3"), frame(top, "usr/a/0"), frame(mid, "usr/a/2"), frame(top, "usr/b")} {
		if f := []*Filler{low, top, top, mid, top}[i]; !w.seek(f, at) {
			t.Fatalf("%s isn't found", all[i])
		}
		if got := follow(); !slices.Equal(got, all[i+1:]) {
			t.Errorf("behind %s there are %q, want %q", all[i], got, all[i+1:])
		}
	}
	// To seek from where it is, in the same directory and in another one, is as good.
	for _, at := range []int{2, 3, 0, 5} {
		f := []*Filler{low, top, top, mid, top, mid}[at]
		if !w.seek(f, frame(f, all[at][4:])) {
			t.Fatalf("%s isn't found", all[at])
		}
		file, ok := w.next()
		if !ok {
			t.Fatalf("nothing is behind %s", all[at])
		}
		if name, _ := file.f.layer.Path(file.inode); names[file.f]+name != all[at+1] {
			t.Errorf("behind %s is %s, want %s", all[at], names[file.f]+name, all[at+1])
		}
	}
	if got, want := follow(), all[7:]; !slices.Equal(got, want) {
		t.Errorf("then there are %q, want %q", got, want)
	}
	for _, hidden := range []string{"usr/b/1", "usr/gone/x", "usr/o/old"} {
		if w.seek(low, frame(low, hidden)) {
			t.Errorf("%s was found, which is hidden", hidden)
		}
	}
}

// A layer that two images have is listed with what each of them has below it.
func TestWalksShareListingsOfTheSameDirectoriesOnly(t *testing.T) {
	s := NewScheduler(SchedulerOptions{})
	defer s.Close()
	top := treeWith(t, s, nil, "usr/a")
	lists := &listings{}
	for _, name := range []string{"usr/b", "usr/c", "usr/d"} {
		below := treeWith(t, s, nil, name)
		w := &walk{layers: view{top, below}, lists: lists}
		if !w.seek(below, 0) {
			t.Fatalf("%s isn't found", name)
		}
		if file, ok := w.next(); !ok || file.f != top {
			t.Errorf("behind %s is %v, %t, want usr/a", name, file, ok)
		}
	}
}
