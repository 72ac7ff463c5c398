package snapshot

import (
	"fmt"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
	"github.com/buildkitd-lazy/buildkitd-lazy/store"
)

// BenchmarkImplied is a layer without an entry for any of its 4,000 directories, as some builders make them.
func BenchmarkImplied(b *testing.B) {
	builder := layer.NewBuilder(layer.BuilderOptions{})
	for i := range 100_000 {
		if err := builder.Add(fmt.Sprintf("usr/lib/package%d/file%d", i/25, i), layer.Inode{Mode: unix.S_IFREG | 0o644}); err != nil {
			b.Fatal(err)
		}
	}
	l, err := builder.Build(0, nil)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if n := len(impliedOf(l)); n != 4002 {
			b.Fatal(n)
		}
	}
}

// BenchmarkOpen is all that a layer of 100,000 files costs a build, but for the network: from the request for its table of contents to the
// mount; and when the store knows the layer.
func BenchmarkOpen(b *testing.B) {
	was := logrus.GetLevel()
	logrus.SetLevel(logrus.WarnLevel)
	defer logrus.SetLevel(was)
	files := map[string][]byte{}
	for i := range 100_000 {
		dir := fmt.Sprintf("usr/lib/package%d/", i/25)
		files[dir], files[fmt.Sprintf("%sfile%d", dir, i)] = nil, fmt.Append(nil, i)
	}
	l := layerOf(b, files)
	reg := newRegistry(b, nil, l)
	mount := func(s *Snapshotter, name string) {
		if _, err := s.Prepare(b.Context(), name+"-key", "", snapshots.WithLabels(reg.labels(name, l))); !cerrdefs.IsAlreadyExists(err) {
			b.Fatal(err)
		}
	}
	for _, door := range []string{DoorEROFS, DoorFUSE} {
		root := b.TempDir()
		for n, name := range []string{"new", "known"} {
			b.Run(door+"/"+name, func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					b.StopTimer()
					if name == "new" {
						root = b.TempDir()
					}
					s, err := New(root, reg.options(door))
					if err != nil {
						b.Fatal(err)
					}
					n++
					b.StartTimer()
					mount(s, fmt.Sprint("base", n))
					b.StopTimer()
					if err := s.Close(); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
			})
		}
	}
}

// BenchmarkOpenSource opens a layer of 30,000 files that the store has, to copy from it.
func BenchmarkOpenSource(b *testing.B) {
	files := map[string][]byte{}
	for i := range 30_000 {
		dir := fmt.Sprintf("usr/lib/package%d/", i/25)
		files[dir], files[fmt.Sprintf("%sfile%d", dir, i)] = nil, fmt.Append(nil, i)
	}
	l := layerOf(b, files)
	reg := newRegistry(b, nil, l)
	root := b.TempDir()
	s, err := New(root, reg.options(DoorFUSE))
	if err != nil {
		b.Fatal(err)
	}
	if _, err := s.Prepare(b.Context(), "key", "", snapshots.WithLabels(reg.labels("base", l))); !cerrdefs.IsAlreadyExists(err) {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		b.StopTimer()
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
		if s, err = New(root, reg.options(DoorFUSE)); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		o, err := s.door.openSource(b.Context(), store.Key{Blob: l.digest, TOC: l.toc})
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		o.close()
		b.StartTimer()
	}
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
}
