package estargz_test

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/metadata/memory"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/layertest"
)

// mounted reads every file as a mount of stargz-snapshotter does (fs/reader): through its metadata reader, each chunk verified, and with it
// those that stand before it in its frame, which it keeps for later.
func mounted(b blob, entries []layertest.Entry) error {
	m, err := memory.NewReader(b.reader())
	if err != nil {
		return err
	}
	defer m.Close()
	if got := m.TOCDigest(); got != b.tocDigest {
		return fmt.Errorf("TOC digest %s, want %s", got, b.tocDigest)
	}
	verify := func(what string, p []byte, want string) error {
		if got := digest.FromBytes(p).String(); got != want {
			return fmt.Errorf("%s has %s, want %s", what, got, want)
		}
		return nil
	}
	for _, e := range entries {
		if e.Typeflag != tar.TypeReg {
			continue
		}
		id := m.RootID()
		for name := range strings.SplitSeq(strings.Trim(path.Clean("/"+e.Name), "/"), "/") {
			if id, _, err = m.GetChild(id, name); err != nil {
				return fmt.Errorf("%q: %w", e.Name, err)
			}
		}
		f, err := m.OpenFileWithPreReader(id, func(other uint32, offset, size int64, want string, r io.Reader) error {
			p := make([]byte, size)
			if _, err := io.ReadFull(r, p); err != nil {
				return err
			}
			return verify(fmt.Sprintf("in front of %q: chunk of node %d at %d", e.Name, other, offset), p, want)
		})
		if err != nil {
			return fmt.Errorf("%q: %w", e.Name, err)
		}
		for at := int64(0); at < int64(len(e.Content)); {
			offset, size, want, ok := f.ChunkEntryForOffset(at)
			if !ok || offset != at || size < 1 {
				return fmt.Errorf("%q: no chunk at %d, but one of %d at %d", e.Name, at, size, offset)
			}
			p := make([]byte, size)
			if _, err := f.ReadAt(p, at); err != nil && !errors.Is(err, io.EOF) {
				return fmt.Errorf("%q: chunk at %d: %w", e.Name, at, err)
			}
			if err := verify(fmt.Sprintf("%q: chunk at %d", e.Name, at), p, want); err != nil {
				return err
			}
			if string(p) != e.Content[at:][:size] {
				return fmt.Errorf("%q at %d has %.40q…, want %.40q…", e.Name, at, p, e.Content[at:])
			}
			at += size
		}
	}
	return nil
}

// mounted sees a wrong byte in a frame that files share.
func TestMountedVerifies(t *testing.T) {
	entries := []layertest.Entry{file("a", noise(1, 1000)), file("b", noise(2, 1000)), file("c", noise(3, 1000))}
	b, _ := written(t, layertest.Tar(t, entries...), estargz.WriteOptions{Level: new(0)})
	if err := mounted(b, entries); err != nil {
		t.Fatal(err)
	}
	at := strings.Index(string(b.data), entries[1].Content)
	if at < 0 {
		t.Fatal("the content isn't in the blob as it is")
	}
	b.data[at+500] ^= 1
	if err := mounted(b, entries); err == nil {
		t.Error("no error")
	}
}
