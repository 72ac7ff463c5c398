package fill

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/store"
)

// BenchmarkOpen is what a Filler finds out about a layer of 100,000 files when it is opened.
func BenchmarkOpen(b *testing.B) {
	im := imageOf(b, 4096, many(100_000, 1)...)
	s := NewScheduler(SchedulerOptions{})
	defer s.Close()
	b.ReportAllocs()
	for b.Loop() {
		if err := s.Open(im.Layer, dsl().serve(im), nil, LayerOptions{}).Close(); err != nil {
			b.Fatal(err)
		}
	}
}

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

// BenchmarkDecode is what a frame costs from its compressed bytes to the page cache of the data file: decompressed, verified, written.
func BenchmarkDecode(b *testing.B) {
	for _, size := range []int64{4 << 10, 64 << 10, 4 << 20} {
		b.Run(fmt.Sprint(size>>10, "KiB"), func(b *testing.B) {
			im := imageOf(b, size, many(int(min((64<<20)/size, 2048)), size)...)
			im.Codec = estargz.Codec{}
			s := NewScheduler(SchedulerOptions{})
			defer s.Close()
			kept, err := store.Open(b.TempDir(), store.Options{Quiet: time.Hour})
			if err != nil {
				b.Fatal(err)
			}
			defer kept.Close()
			key := store.Key{Blob: digest.FromString("blob"), TOC: digest.FromString("toc")}
			var l *store.Layer
			var f *Filler
			again := func() {
				if l != nil {
					l.Release()
					for kept.Remove(key) != nil {
						continue
					}
				}
				if l, err = kept.Create(key, strings.NewReader("toc")); err == nil {
					_, err = l.Bind(im.Layer)
				}
				if err != nil {
					b.Fatal(err)
				}
				f = s.Open(im.Layer, dsl().serve(im), l, LayerOptions{})
			}
			b.SetBytes(size)
			b.ReportAllocs()
			i := len(im.Frames)
			for b.Loop() {
				if i == len(im.Frames) {
					b.StopTimer()
					again()
					i = 0
					b.StartTimer()
				}
				fr := &im.Frames[i]
				if err := f.decode(i, bytes.NewReader(im.blob[fr.Offset:fr.End()])); err != nil {
					b.Fatal(err)
				}
				i++
			}
			b.StopTimer()
			l.Release()
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

// BenchmarkSeek is what a miss costs that is elsewhere in an image which somebody reads from one end to the other, as several threads of one do.
func BenchmarkSeek(b *testing.B) {
	const files = 3000
	layers := []*image{dirOf(b, "usr/lib", files, 100), dirOf(b, "usr/share", files, 100), dirOf(b, "usr/lib/more", files, 100)}
	labs := stack(b, dsl(), SchedulerOptions{}, layers...)
	s := labs[0].s
	defer s.Close()
	w := &walk{layers: labs[0].layers(), lists: &s.lists}
	for i := 0; b.Loop(); i++ {
		if !w.seek(labs[i%2].Filler, i*7%files) {
			b.Fatal("a file isn't found")
		}
		w.next()
	}
}
