package zstd_test

import (
	"os"
	"path/filepath"
	"testing"

	klauspost "github.com/klauspost/compress/zstd"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstd"
)

// inputs are files of a layer, as they are written: sources of a few KB each, 4 MiB of a program. Whoever runs this has both.
func inputs(b *testing.B) map[string][][]byte {
	b.Helper()
	name, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	program, err := os.ReadFile(name)
	if err != nil {
		b.Fatal(err)
	}
	names, err := filepath.Glob("*.go")
	if err != nil {
		b.Fatal(err)
	}
	var sources [][]byte
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			b.Fatal(err)
		}
		sources = append(sources, text)
	}
	return map[string][][]byte{"sources": sources, "program": {program[:4<<20]}}
}

// Beside the levels of klauspost's; sizes are in the report, too.
func BenchmarkAppend(b *testing.B) {
	for name, files := range inputs(b) {
		run := func(of string, encode func(dst, p []byte) []byte) {
			b.Run(name+"/"+of, func(b *testing.B) {
				total := 0
				for _, p := range files {
					total += len(p)
				}
				out := make([]byte, 0, zstd.MaxSize(total)*2)
				b.SetBytes(int64(total))
				b.ReportAllocs()
				for b.Loop() {
					out = out[:0]
					for _, p := range files {
						out = encode(out, p)
					}
				}
				b.ReportMetric(float64(len(out))/float64(total), "of-input")
			})
		}
		run("ours", zstd.Append)
		for of, level := range map[string]klauspost.EncoderLevel{"klauspost1": klauspost.SpeedFastest, "klauspost3": klauspost.SpeedDefault} {
			e, err := klauspost.NewWriter(nil, klauspost.WithEncoderLevel(level), klauspost.WithWindowSize(8<<20), klauspost.WithEncoderConcurrency(1),
				klauspost.WithEncoderCRC(false))
			if err != nil {
				b.Fatal(err)
			}
			run(of, func(dst, p []byte) []byte { return e.EncodeAll(p, dst) })
		}
	}
}
