package snapshot

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

var errRegistry = errors.New("asked the registry")

type noRegistry struct{}

func (noRegistry) Fetch(context.Context, int64, int64) (io.ReadCloser, error) {
	return nil, errRegistry
}

// A blob that an export has brought into the content store is read from there,
// whatever the registry says; until then, and without a store, the registry is asked.
func TestBlobsInTheContentStoreAreNotFetched(t *testing.T) {
	blob := []byte("0123456789")
	dgst := digest.FromBytes(blob)
	store, err := local.NewStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	var provider content.Provider
	l := localFirst{noRegistry{}, dgst, func() content.Provider { return provider }}
	for name, p := range map[string]content.Provider{"no store yet": nil, "not in the store": store} {
		provider = p
		if _, err := l.Fetch(t.Context(), 0, 1); !errors.Is(err, errRegistry) {
			t.Errorf("%s: %v", name, err)
		}
	}
	provider = store
	if err := content.WriteBlob(t.Context(), store, "x", bytes.NewReader(blob), ocispecs.Descriptor{Digest: dgst, Size: 10}); err != nil {
		t.Fatal(err)
	}
	rc, err := l.Fetch(t.Context(), 3, 4)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(rc)
	if err := errors.Join(err, rc.Close()); err != nil || string(got) != "3456" {
		t.Errorf("read %q, %v", got, err)
	}
	if _, err := l.Fetch(t.Context(), 8, 4); !errors.Is(err, errRegistry) {
		t.Errorf("beyond the blob's end: %v", err)
	}
}
