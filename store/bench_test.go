package store

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

func BenchmarkHave(b *testing.B) {
	fx := newFixture("a", newRand(1), 1, 100_000)
	l := hold(b, open(b, b.TempDir(), Options{}), fx)
	b.RunParallel(func(pb *testing.PB) {
		for i := 0; pb.Next(); i++ {
			l.Have(i & 0xffff)
		}
	})
}

// Writes into holes, with the comparison of digests that comes before.
func BenchmarkWriteChunk(b *testing.B) {
	for _, size := range []int64{2 << 10, 64 << 10, 4 << 20} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			const total = 64 << 20
			sizes := make([]int64, min(total/size, 4096))
			for i := range sizes {
				sizes[i] = size
			}
			fx := newFixture("a", newRand(1), size, sizes...)
			s := open(b, b.TempDir(), Options{})
			b.SetBytes(size)
			b.ReportAllocs()
			i, l := 0, hold(b, s, fx)
			buf := make([]byte, size)
			for b.Loop() {
				if i == len(fx.model.Chunks) {
					b.StopTimer()
					l.Release()
					for s.Remove(fx.key) != nil {
						continue
					}
					i, l = 0, hold(b, s, fx)
					b.StartTimer()
				}
				v, err := fx.model.ReadChunk(i, bytes.NewReader(fx.chunk(i)), buf)
				if err == nil {
					err = l.WriteChunk(v)
				}
				if err != nil {
					b.Fatal(err)
				}
				i++
			}
		})
	}
}

// What a restart after a SIGKILL costs for each chunk that is read.
func BenchmarkVerify(b *testing.B) {
	const size = 64 << 10
	root := b.TempDir()
	fx := newFixture("a", newRand(1), size, 32<<20)
	s := open(b, root, Options{})
	fillAll(b, hold(b, s, fx), fx)
	s.Close()
	b.SetBytes(size)
	b.ReportAllocs()
	i := len(fx.model.Chunks)
	var l *Layer
	for b.Loop() {
		if i == len(fx.model.Chunks) {
			b.StopTimer()
			s.Close()
			s = open(b, root, Options{Distrust: true})
			i, l = 0, hold(b, s, fx)
			b.StartTimer()
		}
		if !l.Verify(i) {
			b.Fatal(i)
		}
		i++
	}
}

// Binding a layer of 100,000 chunks after a clean stop and after a kill.
func BenchmarkBind(b *testing.B) {
	for _, distrust := range []bool{false, true} {
		b.Run(fmt.Sprintf("distrust=%v", distrust), func(b *testing.B) {
			sizes := make([]int64, 100_000)
			for i := range sizes {
				sizes[i] = 1 + int64(i%100)
			}
			root := b.TempDir()
			fx := newFixture("a", newRand(1), 4096, sizes...)
			s := open(b, root, Options{})
			l := hold(b, s, fx)
			for i := 0; i < len(sizes); i += 3 {
				if err := l.WriteChunk(fx.verified(i)); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportAllocs()
			for b.Loop() {
				b.StopTimer()
				if err := s.Close(); err != nil {
					b.Fatal(err)
				}
				s = open(b, root, Options{Distrust: distrust})
				b.StartTimer()
				hold(b, s, fx)
			}
		})
	}
}

// What it takes to compare a layer of 30,000 files with 20 others of as many that are in the store, none of which has one of its files.
func BenchmarkAlike(b *testing.B) {
	s := open(b, b.TempDir(), Options{})
	var l *Layer
	for n := range 21 {
		name := fmt.Sprint("layer ", n)
		fx := &fixture{key: Key{Blob: digest.FromString(name), TOC: digest.FromString("toc of " + name)}, truth: []byte(name)}
		fx.model = &layer.Layer{Inodes: []layer.Inode{{Mode: 0o40755}}, DataSize: 30_000 * layer.BlockSize}
		for i := range 30_000 {
			content := fmt.Append([]byte(name), i)
			if i == 0 {
				content = fx.truth
			}
			fx.model.Chunks = append(fx.model.Chunks, layer.Chunk{Data: int64(i) * layer.BlockSize, Size: int64(len(content))})
			fx.model.Digests = append(fx.model.Digests, sha256.Sum256(content))
		}
		l = hold(b, s, fx)
		l.Alike(0)
		if n == 20 {
			break
		}
		if err := errors.Join(l.WriteChunk(fx.verified(0)), l.Settle()); err != nil {
			b.Fatal(err)
		}
		l.Release()
	}
	b.ReportAllocs()
	for b.Loop() {
		if alike := l.Alike(0); len(alike) > 0 {
			b.Fatal(alike)
		}
	}
}
