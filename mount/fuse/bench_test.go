package fuse

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/mount/mounttest"
)

// manyFiles is a layer of 30,000 entries.
func manyFiles(b *testing.B) *mounttest.Tree {
	var entries []mounttest.Entry
	for i := range 300 {
		for j := range 99 {
			entries = append(entries, mounttest.File(fmt.Sprintf("usr/share/dir%d/sub%d/file number %d", i/10, i, j), []byte{byte(j)}))
		}
	}
	return mounttest.Build(b, entries...)
}

// plain unpacks a tree.
func plain(b *testing.B, tree *mounttest.Tree) string {
	dir := b.TempDir()
	for name, content := range tree.Files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			b.Fatal(err)
		}
		if err := os.WriteFile(path, content, 0o644); err != nil {
			b.Fatal(err)
		}
	}
	return dir
}

// mounted mounts a tree whose content is there.
func mounted(b *testing.B, tree *mounttest.Tree, opt Options) string {
	opt.Root = b.TempDir()
	f := mounttest.Lay(b, opt.Root, tree)
	if _, err := f.Data.WriteAt(f.Content, 0); err != nil {
		b.Fatal(err)
	}
	mo := options(f)
	mo.Filler = nothing{}
	mustMount(b, openDoor(b, opt), mo)
	return f.Target
}

func forget(b *testing.B) {
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		b.Fatal(err)
	}
}

func BenchmarkFind(b *testing.B) {
	tree := manyFiles(b)
	for _, door := range []struct{ name, dir string }{{"plain", plain(b, tree)}, {"fuse", mounted(b, tree, Options{})}} {
		for _, args := range [][]string{{"names"}, {"stat", "-size", "+1"}} {
			run := func(b *testing.B) {
				if out, err := exec.CommandContext(b.Context(), "find", append([]string{door.dir}, args[1:]...)...).Output(); err != nil {
					b.Fatal(err, out)
				}
			}
			b.Run("cold/"+args[0]+"/"+door.name, func(b *testing.B) {
				for b.Loop() {
					b.StopTimer()
					forget(b)
					b.StartTimer()
					run(b)
				}
			})
			b.Run("warm/"+args[0]+"/"+door.name, func(b *testing.B) {
				for b.Loop() {
					run(b)
				}
			})
		}
	}
}

// What was read before comes from the data file's page cache, but not from the mount's.
func BenchmarkRead(b *testing.B) {
	const size = 256 << 20
	tree := mounttest.Build(b, mounttest.File("file", mounttest.Noise(size)))
	buf := make([]byte, 1<<20)
	for _, door := range []struct{ name, dir string }{
		{"plain", plain(b, tree)},
		{"splice", mounted(b, tree, Options{})},
		{"copy", mounted(b, tree, Options{noSplice: true})},
	} {
		read := func(b *testing.B) {
			f, err := os.Open(filepath.Join(door.dir, "file"))
			if err != nil {
				b.Fatal(err)
			}
			defer f.Close()
			for {
				if _, err := f.Read(buf); err == io.EOF {
					return
				} else if err != nil {
					b.Fatal(err)
				}
			}
		}
		b.Run("uncached/"+door.name, func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				b.StopTimer()
				drop(b, filepath.Join(door.dir, "file"))
				b.StartTimer()
				read(b)
			}
		})
		b.Run("cold/"+door.name, func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				b.StopTimer()
				forget(b)
				b.StartTimer()
				read(b)
			}
		})
		b.Run("cached/"+door.name, func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				read(b)
			}
		})
	}
}

func drop(b *testing.B, path string) {
	f, err := os.Open(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		b.Fatal(err)
	}
}

// Small files, each opened, read and closed, whose names the kernel knows but whose pages it has only of the data file.
func BenchmarkSmallFiles(b *testing.B) {
	tree := manyFiles(b)
	var names []string
	for name := range tree.Files {
		if names = append(names, name); len(names) == 3000 {
			break
		}
	}
	for _, door := range []struct{ name, dir string }{
		{"plain", plain(b, tree)},
		{"splice", mounted(b, tree, Options{})},
		{"copy", mounted(b, tree, Options{noSplice: true})},
	} {
		b.Run(door.name, func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				for _, name := range names {
					if _, err := os.ReadFile(filepath.Join(door.dir, name)); err != nil {
						b.Fatal(err)
					}
					drop(b, filepath.Join(door.dir, name))
				}
				b.StartTimer()
				for _, name := range names {
					if _, err := os.ReadFile(filepath.Join(door.dir, name)); err != nil {
						b.Fatal(err)
					}
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(names)), "ns/file")
		})
	}
}

// nothing is missing.
type nothing struct{}

func (nothing) Fill(context.Context, int64, int64) error { return nil }
