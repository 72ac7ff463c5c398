package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// A fixture is a layer whose content is known.
type fixture struct {
	key   Key
	toc   []byte
	model *layer.Layer
	truth []byte // the data space
}

func (fx *fixture) chunk(i int) []byte {
	c := &fx.model.Chunks[i]
	return fx.truth[c.Data:c.End()]
}

// verified returns a chunk as a store takes it.
func (fx *fixture) verified(i int) layer.Verified {
	p := fx.chunk(i)
	v, err := fx.model.ReadChunk(i, bytes.NewReader(p), make([]byte, len(p)))
	if err != nil {
		panic(err)
	}
	return v
}

// newFixture lays out files of the given sizes in chunks of at most chunk bytes.
func newFixture(name string, rng *rand.Rand, chunk int64, sizes ...int64) *fixture {
	fx := &fixture{
		key:   Key{Blob: digest.FromString(name), TOC: digest.FromString("toc of " + name)},
		toc:   []byte("toc of " + name),
		model: &layer.Layer{},
	}
	var word uint64
	for _, size := range sizes {
		start := int64(len(fx.truth))
		for off := int64(0); off < size; off += chunk {
			p := make([]byte, min(chunk, size-off))
			for i := range p {
				if i%8 == 0 {
					word = rng.Uint64()
				}
				p[i] = byte(word >> (i % 8 * 8))
			}
			if rng.UintN(8) == 0 {
				clear(p) // zeros are content, too
			}
			fx.model.Chunks = append(fx.model.Chunks, layer.Chunk{Data: start + off, Size: int64(len(p))})
			fx.model.Digests = append(fx.model.Digests, sha256.Sum256(p))
			fx.truth = append(fx.truth, p...)
		}
		fx.truth = append(fx.truth, make([]byte, -len(fx.truth)&(layer.BlockSize-1))...)
	}
	fx.model.DataSize = int64(len(fx.truth))
	return fx
}

func randomFixture(name string, rng *rand.Rand) *fixture {
	sizes := make([]int64, 1+rng.IntN(30))
	for i := range sizes {
		sizes[i] = 1 + rng.Int64N(40000)
	}
	return newFixture(name, rng, []int64{4096, 5000, 16384}[rng.IntN(3)], sizes...)
}

func newRand(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 7)) }

func open(t testing.TB, root string, opt Options) *Store {
	t.Helper()
	if opt.Quiet == 0 {
		opt.Quiet = time.Hour
	}
	s, err := Open(root, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// hold acquires or creates the fixture's layer and binds it.
func hold(t testing.TB, s *Store, fx *fixture) *Layer {
	t.Helper()
	l, err := s.Acquire(fx.key)
	if errors.Is(err, fs.ErrNotExist) {
		l, err = s.Create(fx.key, bytes.NewReader(fx.toc))
	}
	if err == nil {
		_, err = l.Bind(fx.model)
	}
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func fillAll(t testing.TB, l *Layer, fx *fixture) {
	t.Helper()
	for i := range fx.model.Chunks {
		if err := l.WriteChunk(fx.verified(i)); err != nil {
			t.Fatal(err)
		}
	}
}

// checkRight fails if a chunk that is there isn't right, by reading the data file itself, or has something behind it.
func checkRight(t testing.TB, l *Layer, fx *fixture) (have int) {
	t.Helper()
	data, err := os.ReadFile(l.DataPath())
	if err != nil {
		t.Fatal(err)
	}
	var filled int64
	for i := range fx.model.Chunks {
		if !l.Have(i) {
			continue
		}
		have++
		c := &fx.model.Chunks[i]
		filled += c.Size
		if end := padded(fx.model, i); int64(len(data)) < end || !bytes.Equal(data[c.Data:end], fx.truth[c.Data:end]) {
			t.Fatalf("chunk %d is there, and wrong", i)
		}
	}
	if l.Filled() != filled || l.Complete() != (have == len(fx.model.Chunks)) {
		t.Fatalf("Filled() = %d, Complete() = %v with %d of %d chunks, %d bytes", l.Filled(), l.Complete(), have, len(fx.model.Chunks), filled)
	}
	return have
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func TestLayer(t *testing.T) {
	rng := newRand(1)
	fx := newFixture("a", rng, 5000, 1, 4096, 12000, 5000, 100)
	s := open(t, t.TempDir(), Options{})

	if _, err := s.Acquire(fx.key); !errors.Is(err, fs.ErrNotExist) || s.Has(fx.key) {
		t.Fatalf("Acquire of nothing: %v", err)
	}
	l, err := s.Create(fx.key, bytes.NewReader(fx.toc))
	if err != nil {
		t.Fatal(err)
	}
	if !s.Has(fx.key) {
		t.Error("the store hasn't got what was created")
	}
	if l.Have(0) || l.Verify(0) || l.Complete() || l.Done() != nil || l.Model() != nil || l.File() != nil {
		t.Error("an unbound layer has something")
	}
	if err := l.WriteChunk(fx.verified(0)); !errors.Is(err, ErrUnbound) {
		t.Errorf("WriteChunk: %v", err)
	}
	if _, err := l.ReadAt(make([]byte, 1), 0); !errors.Is(err, ErrUnbound) {
		t.Errorf("ReadAt: %v", err)
	}
	if m, err := l.Bind(fx.model); err != nil || m != fx.model {
		t.Fatal(m, err)
	}
	again := *fx.model
	if m, err := l.Bind(&again); err != nil || m != fx.model {
		t.Error("binding again doesn't return the model in use", err)
	}
	if _, err := l.Bind(newFixture("b", rng, 5000, 1).model); !errors.Is(err, fs.ErrInvalid) {
		t.Errorf("Bind to another table: %v", err)
	}
	if toc, err := l.TOC(); err != nil || !bytes.Equal(toc, fx.toc) {
		t.Errorf("TOC: %q, %v", toc, err)
	}

	if _, err := l.Origin(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Origin: %v", err)
	}
	for _, want := range []string{`{"ref":"x"}`, ""} {
		if err := l.SetOrigin([]byte(want)); err != nil {
			t.Fatal(err)
		}
		if got, err := l.Origin(); err != nil || string(got) != want {
			t.Errorf("Origin: %q, %v", got, err)
		}
	}

	if _, err := l.Image("v1"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Image: %v", err)
	}
	path, err := l.WriteImage("v1", func(f *os.File) error { _, err := f.WriteString("image"); return err })
	if err != nil {
		t.Fatal(err)
	}
	if got, err := l.Image("v1"); err != nil || got != path {
		t.Errorf("Image: %q, %v", got, err)
	}
	if p, err := os.ReadFile(path); err != nil || !bytes.HasPrefix(p, []byte("image\n")) {
		t.Errorf("image: %q, %v", p, err)
	}
	boom := errors.New("boom")
	if _, err := l.WriteImage("v1", func(*os.File) error { return boom }); !errors.Is(err, boom) {
		t.Errorf("WriteImage: %v", err)
	}
	if _, err := l.Image("v2"); !errors.Is(err, ErrDamaged) {
		t.Errorf("Image of another version: %v", err)
	}

	other := newFixture("a", newRand(1), 5000, 4096)
	for _, v := range []layer.Verified{{}, other.verified(0)} {
		if err := l.WriteChunk(v); !errors.Is(err, fs.ErrInvalid) || l.Have(v.Chunk()) {
			t.Errorf("chunk of another layer: %v", err)
		}
	}
	for _, i := range []int{-1, len(fx.model.Chunks)} {
		if l.Have(i) || l.Verify(i) {
			t.Errorf("there is a chunk %d", i)
		}
	}
	// The third file: chunks 2, 3, 4 of 5000, 5000 and 2000 bytes at 8192.
	for _, i := range []int{3, 3, 5} {
		if err := l.WriteChunk(fx.verified(i)); err != nil {
			t.Fatal(err)
		}
	}
	var runs [][2]int
	for i, j := range l.Missing(0, 100) {
		runs = append(runs, [2]int{i, j})
	}
	if want := [][2]int{{0, 3}, {4, 5}, {6, 7}}; !slices.Equal(runs, want) {
		t.Errorf("Missing: %v, want %v", runs, want)
	}
	for i, j := range l.Missing(3, 4) {
		t.Errorf("Missing(3, 4): %d, %d", i, j)
	}
	checkRight(t, l, fx)
	if l.Filled() != 10000 || closed(l.Done()) {
		t.Errorf("Filled() = %d", l.Filled())
	}

	for _, test := range []struct {
		off, n int64
		want   int
		err    error
	}{
		{13192, 5000, 5000, nil},
		{13192, 5001, 5000, ErrMissing},
		{13000, 10, 0, ErrMissing},
		{20480, 8192, 8192, nil},  // with the padding behind it
		{8191, 10, 0, ErrMissing}, // a missing chunk's last byte
		{1, 4095, 0, ErrMissing},  // a missing chunk's padding
		{fx.model.DataSize, 1, 0, io.EOF},
		{fx.model.DataSize + 5, 1, 0, io.EOF},
		{-1, 1, 0, fs.ErrInvalid},
		{0, 0, 0, nil},
	} {
		p := make([]byte, test.n)
		n, err := l.ReadAt(p, test.off)
		if n != test.want || !errors.Is(err, test.err) {
			t.Errorf("ReadAt(%d bytes, %d) = %d, %v, want %d, %v", test.n, test.off, n, err, test.want, test.err)
		}
		if n > 0 && !bytes.Equal(p[:n], fx.truth[test.off:test.off+int64(n)]) {
			t.Errorf("ReadAt(%d bytes, %d): wrong bytes", test.n, test.off)
		}
	}

	fillAll(t, l, fx)
	checkRight(t, l, fx)
	if closed(l.Done()) {
		t.Error("done before it's synced")
	}
	if err := l.Settle(); err != nil || !closed(l.Done()) {
		t.Errorf("Done isn't; settled: %v", err)
	}
	p := make([]byte, len(fx.truth)+10)
	if n, err := l.ReadAt(p, 0); n != len(fx.truth) || !errors.Is(err, io.EOF) || !bytes.Equal(p[:n], fx.truth) {
		t.Errorf("all: %d, %v", n, err)
	}
	l.Release()
}

// Padding, and what hasn't arrived, takes no disk.
func TestHolesStayHoles(t *testing.T) {
	fx := newFixture("a", newRand(1), 1<<20, 1<<20, 1, 1<<20, 1)
	l := hold(t, open(t, t.TempDir(), Options{}), fx)
	before := l.Usage()
	for _, i := range []int{1, 3} {
		if err := l.WriteChunk(fx.verified(i)); err != nil {
			t.Fatal(err)
		}
	}
	if got := l.Usage() - before; got != 2*layer.BlockSize {
		t.Errorf("two files of a byte take %d bytes", got)
	}
	if got, want := l.Filled(), int64(2); got != want {
		t.Errorf("Filled() = %d", got)
	}
}

func TestEmptyLayer(t *testing.T) {
	fx := newFixture("empty", newRand(1), 1)
	l := hold(t, open(t, t.TempDir(), Options{}), fx)
	if !l.Complete() || !closed(l.Done()) {
		t.Error("a layer without content isn't complete")
	}
	if n, err := l.ReadAt(make([]byte, 1), 0); n != 0 || !errors.Is(err, io.EOF) {
		t.Error(n, err)
	}
}

// The same blob with two TOCs is two layers.
func TestTOCsDontMix(t *testing.T) {
	rng := newRand(1)
	a, b := newFixture("a", rng, 4096, 10000), newFixture("b", rng, 4096, 20000)
	b.key.Blob = a.key.Blob
	s := open(t, t.TempDir(), Options{})
	la, lb := hold(t, s, a), hold(t, s, b)
	fillAll(t, la, a)
	if n := checkRight(t, lb, b); n != 0 {
		t.Errorf("%d chunks of the other layer", n)
	}
	if toc, err := lb.TOC(); err != nil || !bytes.Equal(toc, b.toc) {
		t.Error(toc, err)
	}
}

func TestBindRefuses(t *testing.T) {
	chunks := func(at ...int64) (list []layer.Chunk) {
		for i := 0; i < len(at); i += 2 {
			list = append(list, layer.Chunk{Data: at[i], Size: at[i+1]})
		}
		return list
	}
	s := open(t, t.TempDir(), Options{})
	for name, m := range map[string]*layer.Layer{
		"overlap":         {Chunks: chunks(0, 10, 5, 10), DataSize: 8192},
		"disorder":        {Chunks: chunks(4096, 10, 0, 10), DataSize: 8192},
		"empty chunk":     {Chunks: chunks(0, 0), DataSize: 8192},
		"behind the end":  {Chunks: chunks(4096, 5000), DataSize: 8192},
		"overflow":        {Chunks: chunks(4096, 1<<63-1), DataSize: 8192},
		"negative":        {Chunks: chunks(-4096, 10), DataSize: 8192},
		"negative size":   {DataSize: -1},
		"in one block":    {Chunks: chunks(0, 10, 20, 10), DataSize: 8192},
		"beyond any file": {Chunks: chunks(0, 10), DataSize: 1<<63 - 1},
	} {
		l, err := s.Create(Key{digest.FromString(name), digest.FromString(name)}, strings.NewReader(""))
		if err != nil {
			t.Fatal(err)
		}
		m.Digests = make([][sha256.Size]byte, len(m.Chunks))
		if _, err := l.Bind(m); err == nil {
			t.Errorf("%s: no error", name)
		}
		l.Release()
	}
	for _, key := range []Key{{}, {Blob: digest.FromString("a")}, {"sha256:../../etc", digest.FromString("a")}} {
		if _, err := s.Create(key, strings.NewReader("")); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("Create(%q): %v", key, err)
		}
	}
}

func TestConcurrentUse(t *testing.T) {
	rng := newRand(1)
	s := open(t, t.TempDir(), Options{Quiet: 2 * time.Millisecond})
	fx := newFixture("a", rng, 5000, 100_000, 1, 7, 300_000)
	l := hold(t, s, fx)
	var wg sync.WaitGroup
	for w := range 8 {
		rng := newRand(uint64(w))
		wg.Go(func() {
			l := hold(t, s, fx)
			defer l.Release()
			for _, i := range rng.Perm(len(fx.model.Chunks)) {
				if err := l.WriteChunk(fx.verified(i)); err != nil {
					t.Error(err)
				}
				if !l.Have(i) || !l.Verify(i) {
					t.Errorf("chunk %d isn't there", i)
				}
				c := &fx.model.Chunks[i]
				p := make([]byte, c.Size)
				if _, err := l.ReadAt(p, c.Data); err != nil || !bytes.Equal(p, fx.chunk(i)) {
					t.Errorf("chunk %d: %v", i, err)
				}
				if w == 0 {
					if err := errors.Join(l.Settle(), l.SetOrigin(p)); err != nil {
						t.Error(err)
					}
				}
				if w == 1 {
					s.Usage()
					if err := s.Remove(fx.key); !errors.Is(err, ErrInUse) {
						t.Errorf("Remove: %v", err)
					}
				}
			}
		})
	}
	wg.Go(func() { <-l.Done() })
	wg.Wait()
	checkRight(t, l, fx)
	l.Release()
}

func TestErrorsName(t *testing.T) {
	fx := newFixture("a", newRand(3), 4096, 10_000)
	l := hold(t, open(t, t.TempDir(), Options{}), fx)
	_, err := l.ReadAt(make([]byte, 1), 0)
	for _, want := range []string{"chunk 0", string(fx.key.Blob), l.s.root} {
		if !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("%v: doesn't name %s", err, want)
		}
	}
	if _, err := json.Marshal(fx.key); err != nil {
		t.Error(err)
	}
}
