package erofs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"testing"
	"time"
)

// BenchmarkPresent is what a small file that is there already costs its reader: with the mark, which is an event, and without.
func BenchmarkPresent(b *testing.B) {
	const many = 2000
	content, order := map[string][]byte{}, []string{}
	for i := range many {
		name := fmt.Sprintf("%05d", i)
		content[name] = noise(8 << 10)
		order = append(order, name)
	}
	root := b.TempDir()
	f := lay(b, root, content, order...)
	d, _ := openDoor(b, root)
	src := f.source(b)
	if err := src.Fill(b.Context(), 0, int64(len(f.content))); err != nil {
		b.Fatal(err)
	}
	m := mount(b, d, f, present{})
	defer m.Unmount()
	read := func(b *testing.B) {
		var took time.Duration
		buf := make([]byte, 64<<10)
		for b.Loop() {
			b.StopTimer()
			for _, name := range order {
				drop(b, f.path(name))
			}
			b.StartTimer()
			start := time.Now()
			for _, name := range order {
				file, err := os.Open(f.path(name))
				if err != nil {
					b.Fatal(err)
				}
				for err == nil {
					_, err = file.Read(buf)
				}
				if !errors.Is(err, io.EOF) {
					b.Fatal(err)
				}
				file.Close()
			}
			took += time.Since(start)
		}
		b.ReportMetric(float64(took.Microseconds())/float64(b.N)/many, "µs/file")
	}
	b.Run("marked", read)
	if err := m.Complete(); err != nil {
		b.Fatal(err)
	}
	b.Run("complete", read)
}

// present is a Filler of a layer of which all is there.
type present struct{}

func (present) Fill(context.Context, int64, int64) error { return nil }
