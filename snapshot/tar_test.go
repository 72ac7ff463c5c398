package snapshot

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
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

// The tar of a layer of Podman's is made of what has arrived, and what hasn't is fetched in few requests, whether the layer is mounted or not.
func TestTarOfPodmans(t *testing.T) { eachDoor(t, testTarOfPodmans) }

func testTarOfPodmans(t *testing.T, door string) {
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
	if _, _, err := r.Tar(t.Context(), labels, nil, headers); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of a layer that isn't there: %v", err)
	}
	if _, err := r.Prepare(t.Context(), "key", "", snapshots.WithLabels(labels)); !cerrdefs.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	check := func(least, most int64) {
		t.Helper()
		before, asked := counter.sent.Load(), requests.n.Load()
		tr, toc, err := r.Tar(t.Context(), labels, nil, headers)
		if err != nil {
			t.Fatal(err)
		}
		if toc != nil {
			t.Errorf("a table of contents of %d bytes", len(toc))
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
	for _, bad := range []zstdchunked.Position{{Offset: -1, Size: 5}, {Offset: 0, Size: 1 << 40}} {
		if _, _, err := r.Tar(t.Context(), labels, nil, bad); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("headers at %s: %v", bad, err)
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("nobody wants it"))
	if tr, _, err := r.Tar(ctx, labels, nil, headers); err == nil {
		t.Error("nobody wants it, and it was opened")
		tr.Close()
	}
}

// The tar of an eStargz layer is made of what has arrived of the inside of large files, and for the rest of its blob.
func TestTarOfEStargz(t *testing.T) { eachDoor(t, testTarOfEStargz) }

func testTarOfEStargz(t *testing.T, door string) {
	files := map[string][]byte{"a": random(100), "big1": random(14 << 20), "c": random(1000), "d/": nil, "z": random(300_000)}
	files["big2"] = bytes.Repeat([]byte("much the same "), 1<<20) // its frames are small
	l := layerOf(t, files)
	counter := &counting{blobs: map[string][]byte{l.digest.String(): l.blob}}
	reg := newRegistry(t, counter.ServeHTTP, l)
	requests := countRequests(reg)
	r := newReopenable(t, reg.options(door))
	r.lazily(reg, "base", "", l)
	labels := reg.labels("base", l)
	in, err := gzip.NewReader(bytes.NewReader(l.blob))
	if err != nil {
		t.Fatal(err)
	}
	want, err := io.ReadAll(in)
	if err != nil {
		t.Fatal(err)
	}
	check := func(saved int64) {
		t.Helper()
		before, asked := counter.sent.Load(), requests.n.Load()
		tr, toc, err := r.Tar(t.Context(), labels, nil, zstdchunked.Position{})
		if saved == 0 {
			if !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("nothing is gained: %v", err)
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(tr)
		if err := errors.Join(err, tr.Close()); err != nil {
			t.Fatal(err)
		}
		z, err := gzip.NewReader(bytes.NewReader(toc))
		if err != nil {
			t.Fatal(err)
		}
		behind, err := io.ReadAll(z)
		if err != nil || !bytes.Equal(slices.Concat(got, behind), want) {
			t.Errorf("%d and %d bytes, want %d: %v", len(got), len(behind), len(want), err)
		}
		if n, all := counter.sent.Load()-before, int64(len(l.blob)); n > all-saved {
			t.Errorf("%d bytes of %d were fetched, of which %d are there", n, all, saved)
		}
		if n := requests.n.Load() - asked; n > 3 {
			t.Errorf("%d requests", n)
		}
	}
	check(0)
	r.in("reader", "base", func(dir string) error {
		for _, name := range []string{"big1", "big2"} {
			wantFile(t, dir, name, files[name])
		}
		return nil
	})
	check(12 << 20)
	r.reopen(nil)
	check(12 << 20)
}
