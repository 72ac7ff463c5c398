package zstdchunked

import (
	"hash/crc64"
	"math/rand/v2"
	"testing"

	"github.com/vbatts/tar-split/tar/storage"
)

func TestCRC(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	p := make([]byte, 5000)
	for i := range p {
		p[i] = byte(r.Uint32())
	}
	for size := range 400 {
		sum := r.Uint64()
		if size%2 == 0 {
			sum = 0
		}
		at := r.IntN(100)
		if got, want := crc(sum, p[at:][:size]), crc64.Update(sum, storage.CRCTable, p[at:][:size]); got != want {
			t.Errorf("%d bytes behind %x: %x, want %x", size, sum, got, want)
		}
	}
	// In pieces, as it is computed of a file that has several chunks.
	cut := 1234
	if got, want := crc(crc(0, p[:cut]), p[cut:]), crc64.Checksum(p, storage.CRCTable); got != want {
		t.Errorf("in two pieces: %x, want %x", got, want)
	}
}

func BenchmarkCRC(b *testing.B) {
	p := make([]byte, 1<<20)
	b.SetBytes(int64(len(p)))
	for b.Loop() {
		crc(0, p)
	}
}
