package store

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestBitmap(t *testing.T) {
	for _, n := range []int{0, 1, 63, 64, 65, 200} {
		rng := newRand(uint64(n))
		b := newBitmap(n)
		want := make([]bool, n)
		for range n {
			i := rng.IntN(n)
			if rng.IntN(3) == 0 {
				b.remove(i)
				want[i] = false
			} else if b.add(i) == want[i] {
				t.Errorf("add(%d) of %d", i, n)
			} else {
				want[i] = true
			}
		}
		count := 0
		for i, in := range want {
			if b.has(i) != in {
				t.Errorf("has(%d) of %d", i, n)
			}
			if in {
				count++
			}
			for _, end := range []int{i, i + 1, n} {
				for _, in := range []bool{false, true} {
					next := end
					if j := slices.Index(want[i:end], in); j >= 0 {
						next = i + j
					}
					if got := b.next(i, end, in); got != next {
						t.Errorf("next(%d, %d, %v) of %d = %d, want %d", i, end, in, n, got, next)
					}
				}
			}
		}
		if b.count() != count {
			t.Errorf("count() of %d", n)
		}
		c := newBitmap(n)
		if !c.load(b.bytes(), n) || !bytes.Equal(c.bytes(), b.bytes()) {
			t.Errorf("bytes of %d", n)
		}
		if c.load(append(b.bytes(), 0), n) || n%64 > 0 && c.load(bytes.Repeat([]byte{255}, len(b)*8), n) {
			t.Errorf("a set of more than %d", n)
		}
	}
}

func mapOf(t testing.TB, fx *fixture, have, maybe bitmap) []byte {
	t.Helper()
	table := tableSum(fx.model)
	p, err := json.Marshal(fillMap{Table: table[:], Chunks: len(fx.model.Chunks), Have: have.bytes(), Maybe: maybe.bytes()})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func FuzzMap(f *testing.F) {
	fx := newFixture("a", newRand(1), 4096, 400_000)
	n := len(fx.model.Chunks)
	have, maybe := newBitmap(n), newBitmap(n)
	f.Add(mapOf(f, fx, have, maybe))
	have.add(3)
	have.add(n - 1)
	maybe.add(4)
	f.Add(mapOf(f, fx, have, maybe))
	maybe.add(3)
	f.Add(mapOf(f, fx, have, maybe))
	for _, s := range []string{"", "{}", "null", "[]", `{"chunks":98}`, `{"chunks":-1,"have":"AA=="}`} {
		f.Add([]byte(s))
	}
	table := tableSum(fx.model)
	f.Fuzz(func(t *testing.T, p []byte) {
		have, maybe := newBitmap(n), newBitmap(n)
		m, err := decodeMap(p, table, n, have, maybe)
		if err != nil {
			return
		}
		if m.Chunks != n || have.count()+maybe.count() > n || have.next(0, len(have)*64, true) > len(have)*64 {
			t.Errorf("%d there, %d in doubt of %d", have.count(), maybe.count(), n)
		}
		for i := n; i < len(have)*64; i++ {
			if have.has(i) || maybe.has(i) {
				t.Errorf("chunk %d of %d", i, n)
			}
		}
		again := newBitmap(n)
		if _, err := decodeMap(mapOf(t, fx, have, maybe), table, n, again, newBitmap(n)); err != nil || !bytes.Equal(again.bytes(), have.bytes()) {
			t.Errorf("again: %v", err)
		}
	})
}

func FuzzSealed(f *testing.F) {
	dir := f.TempDir()
	path := filepath.Join(dir, "sealed")
	if err := replaceSealed(dir, path, "label", false, func(f *os.File) error { _, err := f.WriteString("content"); return err }); err != nil {
		f.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	if p, err := readSealed(path, "label"); err != nil || string(p) != "content" {
		f.Fatal(p, err)
	}
	if _, err := readSealed(path, "other"); !errors.Is(err, ErrDamaged) {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:len(good)-1])
	f.Add(good[1:])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, p []byte) {
		path := filepath.Join(t.TempDir(), "sealed")
		if err := os.WriteFile(path, p, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := readSealed(path, "label")
		if err != nil {
			if !errors.Is(err, ErrDamaged) || !errors.Is(err, fs.ErrNotExist) {
				t.Error(err)
			}
			return
		}
		again := filepath.Join(t.TempDir(), "again")
		if err := replaceSealed(filepath.Dir(again), again, "label", true, func(f *os.File) error { _, err := f.Write(got); return err }); err != nil {
			t.Fatal(err)
		}
		if q, err := os.ReadFile(again); err != nil || !bytes.Equal(p, q) {
			t.Errorf("%q sealed again is %q, %v", p, q, err)
		}
	})
}
