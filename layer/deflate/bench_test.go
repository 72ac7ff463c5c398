package deflate_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/gzip"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/deflate"
)

// frames are those of a layer, as they are written: 90 KB of sources, 4 MiB of a program. Whoever runs this has both.
func frames(b *testing.B) map[string][]byte {
	b.Helper()
	name, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	program, err := os.ReadFile(name)
	if err != nil {
		b.Fatal(err)
	}
	files, err := filepath.Glob("*.go")
	if err != nil {
		b.Fatal(err)
	}
	var sources bytes.Buffer
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			b.Fatal(err)
		}
		sources.Write(text)
	}
	return map[string][]byte{"sources": sources.Bytes(), "program": program[:4<<20]}
}

// Beside the levels of klauspost's that it stands for; sizes are in the report, too.
func BenchmarkGzip(b *testing.B) {
	for name, in := range frames(b) {
		b.Run(name+"/ours", func(b *testing.B) {
			out := make([]byte, 0, deflate.MaxSize(len(in)))
			b.SetBytes(int64(len(in)))
			b.ReportAllocs()
			for b.Loop() {
				out = deflate.AppendGzip(out[:0], in)
			}
			b.ReportMetric(float64(len(out))/float64(len(in)), "of-input")
		})
		for level, of := range map[int]string{6: "klauspost6", 7: "klauspost7"} {
			b.Run(name+"/"+of, func(b *testing.B) {
				var out bytes.Buffer
				gz, err := gzip.NewWriterLevel(&out, level)
				if err != nil {
					b.Fatal(err)
				}
				b.SetBytes(int64(len(in)))
				b.ReportAllocs()
				for b.Loop() {
					out.Reset()
					gz.Reset(&out)
					if _, err := gz.Write(in); err != nil {
						b.Fatal(err)
					}
					if err := gz.Close(); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(out.Len())/float64(len(in)), "of-input")
			})
		}
	}
}
