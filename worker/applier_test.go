package worker

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// memory is a content store of blobs in memory.
type memory map[digest.Digest][]byte

func (m memory) ReaderAt(_ context.Context, desc ocispecs.Descriptor) (content.ReaderAt, error) {
	b, ok := m[desc.Digest]
	if !ok {
		return nil, fmt.Errorf("blob %s: %w", desc.Digest, cerrdefs.ErrNotFound)
	}
	return memoryBlob{bytes.NewReader(b)}, nil
}

type memoryBlob struct{ *bytes.Reader }

func (memoryBlob) Close() error { return nil }

func (m memory) add(blob []byte, mediaType, toc string) ocispecs.Descriptor {
	desc := ocispecs.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(blob), Size: int64(len(blob))}
	if toc != "" {
		desc.Annotations = map[string]string{estargz.TOCJSONDigestAnnotation: toc}
	}
	m[desc.Digest] = blob
	return desc
}

// tarOf makes a tar file of names: "dir/", "link->target" for a hard link, and else a
// file that holds its name.
func tarOf(t *testing.T, names ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range names {
		h := &tar.Header{Name: name, Mode: 0o640, Uid: os.Getuid(), Gid: os.Getgid(), Typeflag: tar.TypeReg, Size: int64(len(name))}
		if strings.HasSuffix(name, "/") {
			h.Typeflag, h.Mode, h.Size = tar.TypeDir, 0o750, 0
		}
		var link bool
		if h.Name, h.Linkname, link = strings.Cut(name, "->"); link {
			h.Typeflag, h.Size = tar.TypeLink, 0
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			io.WriteString(w, name)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// overlayOn is an overlay's mount, that nobody makes, and its upper directory.
func overlayOn(t *testing.T, lower string) ([]mount.Mount, string) {
	t.Helper()
	upper := t.TempDir()
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{
		"workdir=" + t.TempDir(), "upperdir=" + upper, "lowerdir=" + lower + ":" + t.TempDir(),
	}}}, upper
}

// listing is mode, name and content of everything below dir.
func listing(t *testing.T, dir string) (lines []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		var data []byte
		if info.Mode().IsRegular() {
			if data, err = os.ReadFile(path); err != nil {
				return err
			}
		}
		lines = append(lines, fmt.Sprintf("%s %s %q", info.Mode(), strings.TrimPrefix(path, dir+"/"), data))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

// TestApplier unpacks layers: what is there must be what containerd's applier makes of
// the files that are no format's. It needs no root.
func TestApplier(t *testing.T) {
	const gz, uncompressed = ocispecs.MediaTypeImageLayerGzip, ocispecs.MediaTypeImageLayer
	own := []string{"a", "d/", "d/" + estargz.TOCTarName, "d/" + estargz.NoPrefetchLandmark, ".wh.gone", "b->a", "parent/child"}
	tarball := tarOf(t, own...)
	built, err := estargz.Build(io.NewSectionReader(bytes.NewReader(tarball), 0, int64(len(tarball))))
	if err != nil {
		t.Fatal(err)
	}
	blob, err := io.ReadAll(built)
	if err := errors.Join(err, built.Close()); err != nil {
		t.Fatal(err)
	}
	toc := built.TOCDigest().String()
	names := []string{estargz.PrefetchLandmark, "a", estargz.TOCTarName}
	directory := []string{".prefetch.landmark/", ".prefetch.landmark/f", "stargz.index.json5", ".wh.stargz.index.json", "prefetch.landmark"}

	for name, c := range map[string]struct {
		blob      []byte
		mediaType string
		toc       string
		want      []string
	}{
		"eStargz":            {blob, gz, toc, own},
		"type of Docker":     {blob, images.MediaTypeDockerSchema2LayerGzip, toc, own},
		"with annotation":    {tarOf(t, names...), uncompressed, toc, []string{"a"}},
		"without annotation": {tarOf(t, names...), uncompressed, "", names},
		"names of the root":  {tarOf(t, "./stargz.index.json", "/.prefetch.landmark", "x/../.no.prefetch.landmark", "a"), uncompressed, toc, []string{"a"}},
		"not eStargz's":      {tarOf(t, directory...), uncompressed, toc, directory},
		"something follows":  {append(tarOf(t, names...), make([]byte, 100<<10)...), uncompressed, toc, []string{"a"}},
	} {
		t.Run(name, func(t *testing.T) {
			// What is below stays visible, whatever its name, and lends its modes.
			lower := t.TempDir()
			if err := os.Mkdir(filepath.Join(lower, "parent"), 0o700); err != nil {
				t.Fatal(err)
			}
			for _, file := range []string{estargz.TOCTarName, estargz.NoPrefetchLandmark} {
				if err := os.WriteFile(filepath.Join(lower, file), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			store := memory{}
			mounts, like := overlayOn(t, lower)
			if _, err := apply.NewFileSystemApplier(store).Apply(t.Context(), store.add(tarOf(t, c.want...), uncompressed, ""), mounts); err != nil {
				t.Fatal(err)
			}
			desc := store.add(c.blob, c.mediaType, c.toc)
			mounts, upper := overlayOn(t, lower)
			applied, err := newApplier(store).Apply(t.Context(), desc, mounts)
			if err != nil {
				t.Fatal(err)
			}
			if got, want := listing(t, upper), listing(t, like); !slices.Equal(got, want) {
				t.Errorf("unpacked\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
			// Of the whole tar file, as manifests and configurations know it.
			whole := c.blob
			if c.mediaType != uncompressed {
				zr, err := gzip.NewReader(bytes.NewReader(c.blob))
				if err != nil {
					t.Fatal(err)
				}
				if whole, err = io.ReadAll(zr); err != nil {
					t.Fatal(err)
				}
			}
			if applied.Digest != digest.FromBytes(whole) || applied.Size != int64(len(whole)) || applied.MediaType != uncompressed {
				t.Errorf("applied %+v, want a tar file of %d bytes, %s", applied, len(whole), digest.FromBytes(whole))
			}
		})
	}
}

// TestApplierFails has layers that can't be unpacked.
func TestApplierFails(t *testing.T) {
	var zipped bytes.Buffer
	w := gzip.NewWriter(&zipped)
	w.Write(tarOf(t, "a", estargz.TOCTarName))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	blob := zipped.Bytes()
	gz := ocispecs.MediaTypeImageLayerGzip
	store := memory{}
	toc := digest.FromString("toc").String()
	for name, c := range map[string]struct {
		desc ocispecs.Descriptor
		opts []diff.ApplyOpt
		err  error
	}{
		"no blob":            {desc: memory{}.add([]byte("elsewhere"), gz, toc), err: cerrdefs.ErrNotFound},
		"unknown media type": {desc: store.add([]byte("x"), "application/x", toc), err: diff.ErrNoProcessor},
		"cut off":            {desc: store.add(blob[:len(blob)/2], gz, toc), err: io.ErrUnexpectedEOF},
		"cut off at the end": {desc: store.add(blob[:len(blob)-4], gz, toc), err: io.ErrUnexpectedEOF},
		"encrypted":          {desc: store.add([]byte("secret"), gz+"+encrypted", ""), err: errEncrypted},
		"option":             {desc: store.add(blob, gz, toc), opts: []diff.ApplyOpt{diff.WithSyncFs(true)}, err: cerrdefs.ErrNotImplemented},
	} {
		t.Run(name, func(t *testing.T) {
			mounts, _ := overlayOn(t, t.TempDir())
			if _, err := newApplier(store).Apply(t.Context(), c.desc, mounts, c.opts...); !errors.Is(err, c.err) || !strings.Contains(err.Error(), "layer "+c.desc.Digest.String()) {
				t.Errorf("error %v, want %v of layer %s", err, c.err, c.desc.Digest)
			}
		})
	}
}
