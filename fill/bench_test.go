package fill

import (
	"bytes"
	"context"
	"fmt"
	"testing"
	"time"
)

// What is in the sink costs its reader a look, whether the rest of the layer is there or not.
func BenchmarkFillPresent(b *testing.B) {
	im := imageOf(b, 64<<10, many(5000, 20_000)...)
	l := newLab(b, &link{rate: 1e12, rtt: time.Nanosecond}, im, SchedulerOptions{})
	defer l.s.Close()
	for i := range 1000 {
		l.readFile(b, i)
	}
	if l.Stats().Missing == 0 {
		b.Fatal("the layer is full")
	}
	b.Run("one reader", func(b *testing.B) {
		b.ReportAllocs()
		for i := int64(0); b.Loop(); i++ {
			if err := l.Fill(context.Background(), i%1000*20480, 4096); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("all processors", func(b *testing.B) {
		b.RunParallel(func(pb *testing.PB) {
			for i := int64(0); pb.Next(); i++ {
				if err := l.Fill(context.Background(), i%1000*20480, 4096); err != nil {
					b.Error(err)
				}
			}
		})
	})
}

// nowhere is a Sink that keeps nothing.
type nowhere struct{}

func (nowhere) Have(int) bool                { return false }
func (nowhere) WriteChunk(int, []byte) error { return nil }

func BenchmarkDecode(b *testing.B) {
	for _, size := range []int64{4 << 10, 64 << 10, 4 << 20} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			im := imageOf(b, size, size)
			s := NewScheduler(SchedulerOptions{})
			defer s.Close()
			f := s.Open(im.Layer, dsl().serve(im), nowhere{}, LayerOptions{})
			b.SetBytes(size)
			b.ReportAllocs()
			for b.Loop() {
				if err := f.decode(0, bytes.NewReader(im.blob)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkMiss is what a miss costs beside the network, the decompression and the sink.
func BenchmarkMiss(b *testing.B) {
	im := imageOf(b, 4096, many(30_000, 4096)...)
	for b.Loop() {
		l := newLab(b, &link{rate: 1e12}, im, SchedulerOptions{})
		for i := range 30_000 {
			if err := l.Fill(context.Background(), im.file(i).off, 4096); err != nil {
				b.Fatal(err)
			}
		}
		l.s.Close()
	}
	b.ReportMetric(float64(b.Elapsed())/float64(b.N)/30_000, "ns/file")
}
