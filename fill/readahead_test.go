package fill

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/iotest"
	"time"
)

// blob is a Fetcher over memory which notes what it was asked for.
type blob struct {
	data []byte
	fail error

	mu   sync.Mutex
	asks [][2]int64
	hold chan struct{} // if set, bodies wait for it
}

func newBlob(size int) *blob {
	b := &blob{data: make([]byte, size)}
	r := rand.New(rand.NewPCG(1, 2))
	for i := range b.data {
		b.data[i] = byte(r.Uint32())
	}
	return b
}

func (b *blob) Fetch(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	b.mu.Lock()
	b.asks = append(b.asks, [2]int64{off, n})
	hold := b.hold
	b.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	if b.fail != nil {
		return nil, b.fail
	}
	return io.NopCloser(iotest.HalfReader(bytes.NewReader(b.data[off : off+n]))), nil
}

func (b *blob) asked() [][2]int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	asks := slices.Clone(b.asks)
	slices.SortFunc(asks, func(a, b [2]int64) int { return int(a[0] - b[0]) })
	return asks
}

func read(t *testing.T, r *Readahead, b *blob, off, n int64) {
	t.Helper()
	body, err := r.Fetch(t.Context(), off, n)
	if err != nil {
		t.Fatalf("fetch %d bytes at %d: %v", n, off, err)
	}
	defer body.Close()
	got, err := io.ReadAll(body)
	if err != nil {
		t.Fatalf("read %d bytes at %d: %v", n, off, err)
	}
	if !bytes.Equal(got, b.data[off:off+n]) {
		t.Fatalf("%d bytes at %d differ from the blob's", n, off)
	}
}

func TestRandomReadsAskForNothingElse(t *testing.T) {
	b := newBlob(1 << 20)
	r := New(b, int64(len(b.data)), Options{})
	defer r.Close()
	want := [][2]int64{{0, 100}, {5000, 10}, {90000, 4096}}
	for _, a := range want {
		read(t, r, b, a[0], a[1])
	}
	if got := b.asked(); !slices.Equal(got, want) {
		t.Errorf("asked for %v, want %v", got, want)
	}
}

func TestSequentialReadIsFetchedAheadOnce(t *testing.T) {
	const size, step = 1 << 20, 4096
	b := newBlob(size)
	r := New(b, size, Options{MaxWindow: 64 << 10})
	for off := int64(0); off < size; off += step {
		read(t, r, b, off, step)
	}
	r.Close()
	asks := b.asked()
	end := int64(0)
	for _, a := range asks {
		if a[0] != end {
			t.Fatalf("asked for %v: bytes are fetched twice or not at all", asks)
		}
		end += a[1]
	}
	if end != size {
		t.Errorf("fetched up to %d of %d", end, size)
	}
	if most := size/(64<<10) + 8; len(asks) > most {
		t.Errorf("%d requests, want at most %d", len(asks), most)
	}
}

func TestStreamsAreToldApart(t *testing.T) {
	const size, step = 1 << 20, 1000
	b := newBlob(size)
	r := New(b, size, Options{MaxWindow: 16 << 10, Streams: 2})
	defer r.Close()
	for i := range int64(50) {
		read(t, r, b, i*step, step)
		read(t, r, b, size/2+i*step, step)
	}
	if n := len(b.asked()); n > 30 {
		t.Errorf("%d requests for two interleaved sequential reads of 50 ranges each", n)
	}
}

func TestForgetAsksAgain(t *testing.T) {
	b := newBlob(1 << 16)
	r := New(b, int64(len(b.data)), Options{MaxWindow: 8 << 10})
	defer r.Close()
	good := b.data
	b.data = bytes.Clone(good) // corrupt on the wire
	b.data[2500] ^= 0xff
	for off := int64(0); off < 3000; off += 1000 {
		read(t, r, b, off, 1000) // as it came
	}
	r.Forget()
	r.wg.Wait() // the windows given up read b.data too
	b.data = good
	read(t, r, b, 2000, 1000)
	read(t, r, b, 3000, 1000)
}

func TestForgottenStreamStillReads(t *testing.T) {
	b := newBlob(1 << 20)
	r := New(b, int64(len(b.data)), Options{Streams: 1})
	defer r.Close()
	read(t, r, b, 0, 100)
	read(t, r, b, 100, 100)
	read(t, r, b, 70000, 100) // forgets the stream at 200
	read(t, r, b, 200, 100)
}

func TestErrorReachesReader(t *testing.T) {
	b := newBlob(1 << 16)
	r := New(b, int64(len(b.data)), Options{})
	defer r.Close()
	read(t, r, b, 0, 100)
	b.fail = errors.New("registry is gone")
	body, err := r.Fetch(t.Context(), 100, 100)
	if err == nil {
		_, err = io.ReadAll(body)
	}
	if !errors.Is(err, b.fail) {
		t.Errorf("error %v, want %v", err, b.fail)
	}
}

func TestReadAfterFailureAsksAgain(t *testing.T) {
	b := newBlob(1 << 16)
	r := New(b, int64(len(b.data)), Options{MaxWindow: 100})
	defer r.Close()
	read(t, r, b, 0, 100)
	b.fail = errors.New("registry is gone")
	body, err := r.Fetch(t.Context(), 100, 100)
	if err == nil {
		_, err = io.ReadAll(body)
	}
	if !errors.Is(err, b.fail) {
		t.Fatalf("error %v, want %v", err, b.fail)
	}
	b.fail = nil
	read(t, r, b, 200, 100)
	read(t, r, b, 100, 100)
}

func TestReaderStopsWaitingWhenCancelled(t *testing.T) {
	b := newBlob(1 << 16)
	r := New(b, int64(len(b.data)), Options{})
	defer r.Close()
	read(t, r, b, 0, 100)
	b.hold = make(chan struct{})
	cause := errors.New("build is cancelled")
	ctx, cancel := context.WithCancelCause(t.Context())
	body, err := r.Fetch(ctx, 100, 100)
	if err != nil {
		t.Fatal(err)
	}
	cancel(cause)
	if _, err := io.ReadAll(body); !errors.Is(err, cause) {
		t.Errorf("error %v, want %v", err, cause)
	}
}

func TestCloseWaitsForWindows(t *testing.T) {
	b := newBlob(1 << 16)
	r := New(b, int64(len(b.data)), Options{})
	read(t, r, b, 0, 100)
	b.hold = make(chan struct{})
	body, err := r.Fetch(t.Context(), 100, 100)
	if err != nil {
		t.Fatal(err)
	}
	closed := make(chan struct{})
	go func() { r.Close(); close(closed) }()
	select {
	case <-closed:
	case <-time.After(10 * time.Second):
		t.Fatal("Close does not cancel a window that waits for its registry")
	}
	if _, err := io.ReadAll(body); !errors.Is(err, errClosed) {
		t.Errorf("read after Close: %v, want %v", err, errClosed)
	}
	if _, err := r.Fetch(t.Context(), 0, 1); !errors.Is(err, errClosed) {
		t.Errorf("Fetch after Close: %v, want %v", err, errClosed)
	}
}

func TestConcurrentReadersGetTheirBytes(t *testing.T) {
	const size = 1 << 20
	b := newBlob(size)
	r := New(b, size, Options{MaxWindow: 32 << 10, Streams: 3})
	defer r.Close()
	var wg sync.WaitGroup
	for g := range int64(6) {
		wg.Go(func() {
			for off := g * 1000; off+5000 < size; off += 5000 {
				body, err := r.Fetch(t.Context(), off, 5000)
				if err != nil {
					t.Error(err)
					return
				}
				got, err := io.ReadAll(body)
				if err != nil {
					t.Error(err)
					return
				}
				if !bytes.Equal(got, b.data[off:off+5000]) {
					t.Errorf("bytes at %d differ", off)
					return
				}
			}
		})
	}
	wg.Wait()
}

// wantOnce checks that no byte was asked for twice and that at most limit bytes were asked for.
func wantOnce(t *testing.T, b *blob, limit int64) {
	t.Helper()
	asks := b.asked()
	end, sum := int64(0), int64(0)
	for _, a := range asks {
		if a[0] < end {
			t.Fatalf("asked for %v: bytes from %d on twice", asks, a[0])
		}
		end, sum = a[0]+a[1], sum+a[1]
	}
	if sum > limit {
		t.Errorf("asked for %d bytes, want at most %d: %v", sum, limit, asks)
	}
}

func TestSkippingReadFetchesNothingTwice(t *testing.T) {
	const size, step = 1 << 20, 4096
	b := newBlob(size)
	r := New(b, size, Options{MaxWindow: 64 << 10})
	for off := int64(0); off < size; off += step {
		if off/step%5 != 3 {
			read(t, r, b, off, step)
		}
	}
	// What was left out is still held, or was never fetched.
	read(t, r, b, size-2*step, step)
	r.Close()
	wantOnce(t, b, size)
}

func TestReadersOfOnePartFetchItOnce(t *testing.T) {
	const size, step = 1 << 20, 4096
	b := newBlob(size)
	r := New(b, size, Options{MaxWindow: 64 << 10})
	for off := int64(0); off+4*step <= size; off += 4 * step {
		// As threads of one reader do: the same part in changing order.
		for _, i := range []int64{1, 0, 3, 2} {
			read(t, r, b, off+i*step, step)
		}
	}
	r.Close()
	wantOnce(t, b, size)
}

func TestSecondOfTwoReadsFetchesLittleAhead(t *testing.T) {
	b := newBlob(8 << 20)
	r := New(b, int64(len(b.data)), Options{})
	read(t, r, b, 1<<20, 512<<10)
	read(t, r, b, 3<<19, 512<<10)
	r.Close()
	wantOnce(t, b, 3*512<<10)
}

func TestHeldWindowsAreBounded(t *testing.T) {
	const size, step, window, streams = 1 << 20, 1000, 2 << 10, 4
	// Behind the readers, and before each two windows and what made the first one larger.
	const limit = maxBehind*window + streams*(2*window+step)
	b := newBlob(size)
	r := New(b, size, Options{MaxWindow: window, Streams: streams})
	defer r.Close()
	for off := int64(0); off+100*step < size; off += 20 * step {
		read(t, r, b, off, step)
		read(t, r, b, off+step, step) // and never what follows
		var held int64
		for _, w := range r.windows {
			held += w.n
		}
		if held > limit {
			t.Fatalf("windows hold %d bytes, want at most %d", held, limit)
		}
	}
}
