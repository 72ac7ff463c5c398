// Package layertest is what tests of layer formats have in common: layers written down as
// data, and the promises of package layer as a check.
package layertest

import (
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// Check fails the test for every promise of package layer's documentation that a layer doesn't keep.
func Check(t testing.TB, l *layer.Layer) {
	t.Helper()
	for _, problem := range problems(l) {
		t.Error(problem)
	}
}

func problems(l *layer.Layer) (found []string) {
	report := func(format string, args ...any) { found = append(found, fmt.Sprintf(format, args...)) }
	if len(l.Inodes) == 0 || !l.Inodes[layer.Root].IsDir() {
		return []string{"no root directory"}
	}
	nlink := make([]uint32, len(l.Inodes))
	nlink[layer.Root] = 1
	for i, in := range l.All() {
		if in.IsDir() {
			nlink[i]++
		} else if in.Entries != nil || in.Implied || in.Opaque {
			report("inode %d: not a directory, but has what only directories have", i)
		}
		for j, e := range in.Entries {
			if j > 0 && e.Name <= in.Entries[j-1].Name {
				report("inode %d: entry %q after %q", i, e.Name, in.Entries[j-1].Name)
			}
			if e.Name == "" || e.Name == "." || e.Name == ".." || len(e.Name) > layer.MaxName || strings.ContainsAny(e.Name, "/\x00") {
				report("inode %d: entry %q", i, e.Name)
			}
			if int(e.Inode) >= len(l.Inodes) || e.Inode == layer.Root {
				report("inode %d: entry %q leads to inode %d", i, e.Name, e.Inode)
				continue
			}
			nlink[e.Inode]++
			if l.Inodes[e.Inode].IsDir() {
				nlink[i]++
			}
		}
		for j, x := range in.Xattrs {
			if j > 0 && x.Name <= in.Xattrs[j-1].Name {
				report("inode %d: xattr %q after %q", i, x.Name, in.Xattrs[j-1].Name)
			}
		}
		switch in.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			if in.Target == "" || int64(len(in.Target)) != in.Size {
				report("inode %d: symlink to %q, size %d", i, in.Target, in.Size)
			}
		case unix.S_IFREG:
			found = append(found, fileProblems(l, i, in)...)
		default:
			if in.Size != 0 {
				report("inode %d: mode %#o, size %d", i, in.Mode, in.Size)
			}
		}
		if in.NumChunks > 0 && !in.IsRegular() {
			report("inode %d: mode %#o, %d chunks", i, in.Mode, in.NumChunks)
		}
	}
	for i, in := range l.All() {
		if in.Nlink != nlink[i] {
			report("inode %d: %d links, counted %d", i, in.Nlink, nlink[i])
		}
	}
	return append(found, contentProblems(l)...)
}

func fileProblems(l *layer.Layer, i uint32, in *layer.Inode) (found []string) {
	report := func(format string, args ...any) {
		found = append(found, fmt.Sprintf("inode %d: ", i)+fmt.Sprintf(format, args...))
	}
	if in.Data%layer.BlockSize != 0 {
		report("data at %d", in.Data)
	}
	if uint64(in.FirstChunk)+uint64(in.NumChunks) > uint64(len(l.Chunks)) {
		report("chunks %d+%d of %d", in.FirstChunk, in.NumChunks, len(l.Chunks))
		return found
	}
	at := in.Data
	for _, c := range l.Chunks[in.FirstChunk:][:in.NumChunks] {
		if c.Data != at {
			report("chunk at %d, want %d", c.Data, at)
		}
		at = c.End()
	}
	if at-in.Data != in.Size {
		report("chunks cover %d of %d bytes", at-in.Data, in.Size)
	}
	return found
}

func contentProblems(l *layer.Layer) (found []string) {
	report := func(format string, args ...any) { found = append(found, fmt.Sprintf(format, args...)) }
	end := int64(0)
	for i, c := range l.Chunks {
		if c.Data < end || c.Size <= 0 || int(c.Frame) >= len(l.Frames) {
			report("chunk %d: %+v after %d", i, c, end)
			continue
		}
		end = c.End()
		if f := l.Frames[c.Frame]; uint32(i)-f.FirstChunk >= f.NumChunks {
			report("chunk %d: frame %d has %d+%d", i, c.Frame, f.FirstChunk, f.NumChunks)
		}
	}
	if l.DataSize%layer.BlockSize != 0 || l.DataSize < end || l.DataSize >= end+layer.BlockSize {
		report("data space of %d bytes, content of %d", l.DataSize, end)
	}
	end = 0
	next := uint32(0)
	for i, f := range l.Frames {
		if f.Offset < end || f.Size <= 0 || f.FirstChunk != next || f.NumChunks == 0 {
			report("frame %d: %+v after %d, chunk %d", i, f, end, next)
		}
		end, next = f.End(), next+f.NumChunks
		inner := int64(0)
		for c := f.FirstChunk; c < next && int(c) < len(l.Chunks); c++ {
			if int64(l.Chunks[c].Inner) < inner {
				report("chunk %d: at %d of its frame, where one ends at %d", c, l.Chunks[c].Inner, inner)
			}
			inner = int64(l.Chunks[c].Inner) + l.Chunks[c].Size
		}
	}
	if int(next) != len(l.Chunks) {
		report("frames hold %d of %d chunks", next, len(l.Chunks))
	}
	return found
}
