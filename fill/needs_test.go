package fill

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// entry is a file of a layer with content, or a symlink.
type entry struct {
	name, target string
	content      []byte
}

func text(name string, n int) entry {
	p := make([]byte, n)
	_, _ = rand.NewChaCha8(sha256.Sum256([]byte(name))).Read(p)
	return entry{name: name, content: p}
}

// treeOf makes a layer of files in this order, with chunks of at most 64 KiB.
func treeOf(t testing.TB, entries ...entry) *image {
	t.Helper()
	const chunk = 64 << 10
	b := layer.NewBuilder(layer.BuilderOptions{})
	var total, chunks int
	for _, e := range entries {
		total += len(e.content)
		chunks += len(e.content)/chunk + 1
	}
	var blob bytes.Buffer
	blob.Grow(total + 64*chunks) // what grows is there twice
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	zw, err := gzip.NewWriterLevel(&blob, gzip.NoCompression)
	check(err)
	for _, e := range entries {
		if e.target != "" {
			check(b.Add(e.name, layer.Inode{Mode: unix.S_IFLNK | 0o777, Target: e.target}))
			continue
		}
		check(b.Add(e.name, layer.Inode{Mode: unix.S_IFREG | 0o755, Size: int64(len(e.content))}))
		for at := 0; at < len(e.content); at += chunk {
			p := e.content[at:min(at+chunk, len(e.content))]
			check(b.Frame(int64(blob.Len())))
			check(b.Chunk(int64(at), int64(len(p)), 0, sha256.Sum256(p)))
			zw.Reset(&blob)
			_, err := zw.Write(p)
			check(err)
			check(zw.Close())
		}
	}
	l, err := b.Build(int64(blob.Len()), gzipCodec{})
	check(err)
	im := &image{Layer: l, blob: blob.Bytes(), data: make([]byte, l.DataSize)}
	for _, e := range entries {
		if e.target == "" {
			i, err := l.Lookup(e.name)
			check(err)
			copy(im.data[l.Inodes[i].Data:], e.content)
		}
	}
	return im
}

// ReadAt implements io.ReaderAt.
func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	first, end := m.im.ChunksOf(off, int64(len(p)))
	for c := first; c < end; c++ {
		if !m.Have(c) {
			return 0, io.ErrUnexpectedEOF
		}
	}
	return copy(p, m.im.data[off:]), nil
}

// has reports whether all of a file has arrived.
func (b *lab) has(t *testing.T, name string) bool {
	t.Helper()
	i, err := b.im.Lookup(name)
	if err != nil {
		t.Fatal(err)
	}
	in := &b.im.Inodes[i]
	for c := in.FirstChunk; c < in.FirstChunk+in.NumChunks; c++ {
		if !b.sink.Have(int(c)) {
			return false
		}
	}
	return true
}

// readHead reads the first block of a file.
func (b *lab) readHead(t *testing.T, name string) {
	t.Helper()
	i, err := b.im.Lookup(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Fill(context.Background(), b.im.Inodes[i].Data, 1); err != nil {
		t.Fatal(err)
	}
}

// labs are the layers of one image.
func labs(t testing.TB, images ...*image) (*Scheduler, []*lab) {
	s := NewScheduler(SchedulerOptions{})
	l := dsl()
	var all []*lab
	var fillers []*Filler
	for _, im := range images {
		b := &lab{s: s, im: im, link: l, from: l.serve(im), sink: newMemory(im)}
		b.Filler = s.Open(im.Layer, b.from, b.sink, LayerOptions{Name: "sha256:test"})
		all, fillers = append(all, b), append(fillers, b.Filler)
	}
	s.Join(fillers...)
	return s, all
}

// filler between the files of the tests, so that no file is fetched for being near to another.
func far(name string) entry { return entry{name: name, content: noise()} }

// noise is the same for all, as there are many.
var noise = sync.OnceValue(func() []byte { return text("", 3<<20).content })

func TestWhatAProgramNeedsIsFetchedWithIt(t *testing.T) {
	base := treeOf(t,
		text("etc/ld.so.cache", 3000), far("usr/lib/x86_64-linux-gnu/a"),
		entry{name: "lib", target: "usr/lib"}, entry{name: "lib64", target: "/usr/lib64"},
		entry{name: "usr/lib64/ld.so", content: elfOf(100_000, "", "")}, far("usr/lib/x86_64-linux-gnu/b"),
		entry{name: "usr/lib/x86_64-linux-gnu/libc.so.6", content: elfOf(300_000, "", "")}, far("usr/lib/x86_64-linux-gnu/c"),
		entry{name: "usr/lib/x86_64-linux-gnu/libz.so.1", target: "libz.so.1.2"},
		entry{name: "usr/lib/x86_64-linux-gnu/libz.so.1.2", content: elfOf(90_000, "", "", "libdeep.so")},
		far("usr/lib/x86_64-linux-gnu/d"),
		entry{name: "usr/lib/x86_64-linux-gnu/libdeep.so", content: elfOf(80_000, "", "", "libc.so.6")},
		far("usr/lib/x86_64-linux-gnu/e"),
		entry{name: "usr/lib/x86_64-linux-gnu/libnone.so", content: elfOf(80_000, "", "")},
	)
	tools := treeOf(t,
		entry{name: "opt/tool/bin/run", content: elfOf(700_000, "/lib64/ld.so", "$ORIGIN/../lib", "libtool.so", "libz.so.1", "libc.so.6")},
		far("opt/tool/a"),
		entry{name: "opt/tool/lib/libtool.so", content: elfOf(200_000, "", "", "libtool.so", "libmissing.so")},
	)
	synctest.Test(t, func(t *testing.T) {
		s, l := labs(t, base, tools)
		defer s.Close()
		l[1].readHead(t, "opt/tool/bin/run")
		time.Sleep(time.Second)
		for _, name := range []string{
			"etc/ld.so.cache", "usr/lib64/ld.so", "usr/lib/x86_64-linux-gnu/libc.so.6",
			"usr/lib/x86_64-linux-gnu/libz.so.1.2", "usr/lib/x86_64-linux-gnu/libdeep.so",
		} {
			if !l[0].has(t, name) {
				t.Errorf("%s was not fetched", name)
			}
		}
		for _, name := range []string{"opt/tool/bin/run", "opt/tool/lib/libtool.so"} {
			if !l[1].has(t, name) {
				t.Errorf("%s was not fetched", name)
			}
		}
		if l[0].has(t, "usr/lib/x86_64-linux-gnu/libnone.so") || l[0].has(t, "usr/lib/x86_64-linux-gnu/a") {
			t.Error("what nothing needs was fetched")
		}
	})
}

// A library that the upper layer replaces is fetched from there.
func TestTheTopmostLayerIsLookedIn(t *testing.T) {
	lib := entry{name: "usr/lib/liba.so", content: elfOf(100_000, "", "")}
	base := treeOf(t, entry{name: "bin/run", content: elfOf(100_000, "/lib/ld.so", "", "liba.so")}, far("x"), lib)
	upper := treeOf(t, lib)
	synctest.Test(t, func(t *testing.T) {
		s, l := labs(t, base, upper)
		defer s.Close()
		l[0].readHead(t, "bin/run")
		time.Sleep(time.Second)
		if l[0].has(t, lib.name) || !l[1].has(t, lib.name) {
			t.Errorf("fetched from the lower layer: %t, from the upper: %t", l[0].has(t, lib.name), l[1].has(t, lib.name))
		}
	})
}

// Who runs a command in a container looks up its user, and starts a shell.
func TestTheShellComesWithTheUsers(t *testing.T) {
	im := treeOf(t,
		text("etc/passwd", 900), far("etc/x"), text("etc/group", 500), far("usr/a"), entry{name: "bin", target: "usr/bin"},
		entry{name: "usr/bin/sh", target: "dash"}, entry{name: "usr/bin/dash", content: elfOf(100_000, "/lib/ld.so", "", "libc.so")},
		far("usr/b"), entry{name: "lib/ld.so", content: elfOf(90_000, "", "")}, far("usr/c"), entry{name: "lib/libc.so", content: elfOf(90_000, "", "")},
	)
	synctest.Test(t, func(t *testing.T) {
		s, l := labs(t, im)
		defer s.Close()
		l[0].readHead(t, "etc/passwd")
		time.Sleep(time.Second)
		for _, name := range []string{"etc/group", "usr/bin/dash", "lib/ld.so", "lib/libc.so"} {
			if !l[0].has(t, name) {
				t.Errorf("%s was not fetched", name)
			}
		}
		if l[0].has(t, "usr/a") {
			t.Error("what nothing needs was fetched")
		}
	})
}

// A path that leads in circles leads nowhere.
func TestCircularLinksAreNotFollowed(t *testing.T) {
	im := treeOf(t, entry{name: "a", target: "b"}, entry{name: "b", target: "/a"}, entry{name: "c", target: "c/c"},
		entry{name: "up", target: "../../../f"}, text("f", 100))
	synctest.Test(t, func(t *testing.T) {
		s, l := labs(t, im)
		defer s.Close()
		v := l[0].view()
		for _, name := range []string{"a", "b/x", "c", "", "/", "..", "nothing", "f/x"} {
			if p, ok := v.find(name); ok {
				t.Errorf("%q is %+v", name, p)
			}
		}
		for _, name := range []string{"f", "/f", "./f", "up"} {
			if _, ok := v.find(name); !ok {
				t.Errorf("%q is nothing", name)
			}
		}
	})
}

// Frames between two that are wanted are fetched along only as far as they can be afforded, and the request ends with them.
func TestARequestEndsWithItsLastFrame(t *testing.T) {
	im := imageOf(t, 4<<20, many(40, 3000)...)
	synctest.Test(t, func(t *testing.T) {
		b := newLab(t, dsl(), im, SchedulerOptions{})
		defer b.s.Close()
		b.s.mu.Lock()
		b.guessed[near] = b.allowance(near) - 16*3200 // for one more frame
		first := b.flight(10, ahead, strict)
		b.flight(15, ahead, strict)
		r := b.s.plan(first)
		b.guessed[near] = 0
		for i := range b.guesses {
			if b.guesses[i] == near {
				b.guessed[near] += im.Frames[i].Size
			}
		}
		if last := r.flights[len(r.flights)-1].frame; r.end != im.Frames[last].End() {
			t.Errorf("the request ends at %d, its last frame, %d, at %d", r.end, last, im.Frames[last].End())
		}
		b.s.send(r)
		b.s.dispatch()
		b.s.mu.Unlock()
		time.Sleep(time.Second)
		if n := b.Stats().Errors; n > 0 || !b.sink.Have(10) || !b.sink.Have(15) {
			t.Errorf("%d errors; frames 10, 15 there: %t, %t", n, b.sink.Have(10), b.sink.Have(15))
		}
	})
}
