package snapshot

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
)

// podmanLayer is a layer of zstd:chunked, with the tar that it was made of and where the headers of that are.
func podmanLayer(t *testing.T, files map[string][]byte) (l testLayer, plain []byte, headers zstdchunked.Position) {
	t.Helper()
	var in, out bytes.Buffer
	w := tar.NewWriter(&in)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o640, Size: int64(len(files[name]))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(files[name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	made, err := zstdchunked.Write(t.Context(), &out, bytes.NewReader(in.Bytes()), zstdchunked.WriteOptions{ChunkSize: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	if headers, err = zstdchunked.ParsePosition(made.Annotations[zstdchunked.TarSplitAnnotation]); err != nil {
		t.Fatal(err)
	}
	return testLayer{out.Bytes(), made.Digest, digest.Digest(made.Annotations[zstdchunked.ChecksumAnnotation])}, in.Bytes(), headers
}

// A layer's tar is made of what has arrived, and what hasn't is fetched in few requests, whether the layer is mounted or not.
func TestTar(t *testing.T) { eachDoor(t, testTar) }

func testTar(t *testing.T, door string) {
	files := map[string][]byte{}
	for i := range 8 {
		content := random(1<<20 + i)
		for j := range content {
			content[j] ^= byte(i) // no two files have a chunk in common
		}
		files[fmt.Sprintf("f%d", i)] = content
	}
	l, plain, headers := podmanLayer(t, files)
	counter := &counting{blobs: map[string][]byte{l.digest.String(): l.blob}}
	reg := newRegistry(t, counter.ServeHTTP, l)
	requests := countRequests(reg)
	r := newReopenable(t, reg.options(door))
	labels := reg.labels("base", l)
	labels[LabelFormats] = FormatLabel(zstdchunked.Position{})
	if _, err := r.Tar(t.Context(), labels, nil, headers); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of a layer that isn't there: %v", err)
	}
	if _, err := r.Prepare(t.Context(), "key", "", snapshots.WithLabels(labels)); !cerrdefs.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	check := func(least, most int64) {
		t.Helper()
		before, asked := counter.sent.Load(), requests.n.Load()
		tr, err := r.Tar(t.Context(), labels, nil, headers)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(tr)
		if err := errors.Join(err, tr.Close()); err != nil || !bytes.Equal(got, plain) {
			t.Errorf("%d bytes, want %d: %v", len(got), len(plain), err)
		}
		if n := counter.sent.Load() - before; n < least || n > most+64<<10 {
			t.Errorf("%d bytes were fetched, want %d to %d", n, least, most)
		}
		if n := requests.n.Load() - asked; n > 5 {
			t.Errorf("%d requests", n)
		}
	}
	check(7<<20, 8<<20) // the end of the blob came with the table of contents
	r.in("reader", "base", func(dir string) error {
		for _, name := range []string{"f1", "f2", "f5"} {
			wantFile(t, dir, name, files[name])
		}
		return nil
	})
	check(1<<20, 5<<20) // and what was read ahead of them
	r.reopen(nil)
	check(1<<20, 5<<20)
	r.in("again", "base", func(dir string) error {
		for name, content := range files {
			wantFile(t, dir, name, content)
		}
		return nil
	})
	check(0, 0)
	for _, bad := range []zstdchunked.Position{{}, {Offset: -1, Size: 5}, {Offset: 0, Size: 1 << 40}} {
		if _, err := r.Tar(t.Context(), labels, nil, bad); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("headers at %s: %v", bad, err)
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("nobody wants it"))
	if tr, err := r.Tar(ctx, labels, nil, headers); err == nil {
		t.Error("nobody wants it, and it was opened")
		tr.Close()
	}
}
