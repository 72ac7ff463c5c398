package store

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

const versionFile = 64 << 10

// versionOf is a layer of 64 files, of which every second is the same in all versions.
func versionOf(n int) *fixture {
	name := fmt.Sprint("version ", n)
	fx := &fixture{
		key: Key{Blob: digest.FromString(name), TOC: digest.FromString("toc of " + name)}, toc: []byte("toc of " + name),
		model: &layer.Layer{Inodes: []layer.Inode{{Mode: 0o40755}}},
	}
	for i := range 64 {
		line := fmt.Sprintf("file %d of version %d\n", i, n*(i%2))
		p := bytes.Repeat([]byte(line), versionFile/len(line)+1)[:versionFile]
		fx.model.Chunks = append(fx.model.Chunks, layer.Chunk{Data: int64(len(fx.truth)), Size: versionFile})
		fx.model.Digests = append(fx.model.Digests, sha256.Sum256(p))
		fx.truth = append(fx.truth, p...)
	}
	fx.model.DataSize = int64(len(fx.truth))
	return fx
}

// evens are the chunks from first up to end that all versions have.
func evens(first, end uint32) (chunks []uint32) {
	for i := first; i < end; i++ {
		if i%2 == 0 {
			chunks = append(chunks, i)
		}
	}
	return chunks
}

// wantAlike compares what a layer finds.
func wantAlike(t *testing.T, l *Layer, least int64, want map[Key][]uint32) {
	t.Helper()
	alike := l.Alike(least)
	for _, a := range alike {
		slices.Sort(a.Chunks)
		if !slices.Equal(a.Chunks, want[a.Key]) || a.Data < int64(len(a.Chunks)*versionFile) {
			t.Errorf("%s: chunks %v, want %v; %d bytes of data", a.Key, a.Chunks, want[a.Key], a.Data)
		}
	}
	if len(alike) != len(want) {
		t.Errorf("%d layers, want %d", len(alike), len(want))
	}
}

// Layers that nobody has open are found by the chunks that they have, also by another process.
func TestAlike(t *testing.T) {
	root := t.TempDir()
	var told []error
	opt := Options{Notice: func(_ Key, err error) { told = append(told, err) }}
	one, half, empty, held, last := versionOf(1), versionOf(2), versionOf(3), versionOf(4), versionOf(5)
	s := open(t, root, opt)
	for fx, n := range map[*fixture]int{one: 64, half: 32, empty: 0, held: 64} {
		l := hold(t, s, fx)
		l.Alike(0) // keeps its order
		for i := range n {
			if err := l.WriteChunk(fx.verified(i)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	s = open(t, root, opt)
	hold(t, s, held)
	l := hold(t, s, last)
	wantAlike(t, l, 0, map[Key][]uint32{one.key: evens(0, 64), half.key: evens(0, 32)})
	wantAlike(t, l, 3<<20, map[Key][]uint32{one.key: evens(0, 64)}) // the other has less
	wantAlike(t, l, int64(len(last.truth))+1, nil)                  // so much isn't missing
	if err := l.WriteChunk(last.verified(0)); err != nil {
		t.Fatal(err)
	}
	wantAlike(t, l, 0, map[Key][]uint32{one.key: evens(2, 64), half.key: evens(2, 32)})
	if len(told) > 0 {
		t.Errorf("told %v", told)
	}

	// Without a map all may be there; a file that is damaged is no file.
	for _, u := range s.Usage() {
		s.mu.Lock()
		dir := s.layers[u.Key].dir
		s.mu.Unlock()
		switch u.Key {
		case half.key:
			if err := os.Remove(filepath.Join(dir, mapFile)); err != nil {
				t.Fatal(err)
			}
		case one.key:
			if err := os.Truncate(filepath.Join(dir, orderFile), 100); err != nil {
				t.Fatal(err)
			}
		}
	}
	wantMay := map[Key][]uint32{half.key: evens(2, 64)}
	for range 2 {
		alike := l.Alike(0)
		if len(alike) != 1 || alike[0].Key != half.key || len(alike[0].Chunks) != len(wantMay[half.key]) {
			t.Errorf("%v, want %v", alike, wantMay)
		}
	}
	if len(told) != 1 || !errors.Is(told[0], ErrDamaged) {
		t.Errorf("told %v, want that a file is damaged", told)
	}
}

// What is borrowed stays open, is read, counts as used, and is removed all the same: then nothing of it is there.
func TestBorrow(t *testing.T) {
	s := open(t, t.TempDir(), Options{Quiet: time.Millisecond})
	fx, other := versionOf(1), versionOf(2)
	for _, fx := range []*fixture{fx, other} {
		l := hold(t, s, fx)
		fillAll(t, l, fx)
		l.Release()
	}
	l, err := s.Borrow(fx.key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Bind(fx.model); err != nil {
		t.Fatal(err)
	}
	if u := s.Usage(); u[1].Key != fx.key || u[1].Refs != 0 {
		t.Errorf("%+v: want it to be the one used last, and held by nobody", u)
	}
	time.Sleep(50 * time.Millisecond) // what nobody has is closed after one
	p := make([]byte, versionFile)
	if _, err := l.ReadAt(p, versionFile); err != nil || !bytes.Equal(p, fx.chunk(1)) || !l.Have(1) {
		t.Errorf("ReadAt: %v", err)
	}
	if err := s.Remove(fx.key); err != nil {
		t.Fatal(err)
	}
	if _, err := l.ReadAt(p, versionFile); err == nil || l.Have(1) || l.File() != nil {
		t.Errorf("removed, and read: %v", err)
	}
	if _, err := l.Bind(fx.model); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("removed, and bound: %v", err)
	}
	if _, err := s.Borrow(fx.key); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("removed, and borrowed: %v", err)
	}
	l.Return()
	defer func() {
		if recover() == nil {
			t.Error("returned twice without a panic")
		}
	}()
	l.Return()
}

// What was borrowed is let go of when it's returned.
func TestReturnedIsClosed(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	fx := versionOf(1)
	hold(t, s, fx).Release()
	l, err := s.Borrow(fx.key)
	if err == nil {
		_, err = l.Bind(fx.model)
	}
	if err != nil {
		t.Fatal(err)
	}
	l.Return()
	for end := time.Now().Add(30 * time.Second); l.Model() != nil; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it is still open")
		}
	}
}
