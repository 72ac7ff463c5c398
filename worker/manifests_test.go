package worker

import (
	"bytes"
	"context"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// Manifests are told of when they have been written, to who has asked for the image.
func TestManifestsThatArrive(t *testing.T) {
	cs, err := local.NewStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	var got []digest.Digest
	asked := context.WithValue(t.Context(), arrivedKey{}, arrived(func(ctx context.Context, manifest digest.Digest) {
		if _, err := cs.Info(ctx, manifest); err != nil {
			t.Errorf("%s isn't here: %v", manifest, err)
		}
		got = append(got, manifest)
	}))
	put := func(ctx context.Context, mediaType, text string) digest.Digest {
		t.Helper()
		desc := ocispecs.Descriptor{MediaType: mediaType, Digest: digest.FromString(text), Size: int64(len(text))}
		if err := content.WriteBlob(ctx, manifests{cs}, text, bytes.NewReader([]byte(text)), desc); err != nil {
			t.Fatal(err)
		}
		return desc.Digest
	}
	first := put(asked, ocispecs.MediaTypeImageManifest, "manifest")
	put(asked, ocispecs.MediaTypeImageManifest, "manifest") // which is here
	put(asked, ocispecs.MediaTypeImageIndex, "index")
	put(asked, ocispecs.MediaTypeImageConfig, "configuration")
	put(t.Context(), ocispecs.MediaTypeImageManifest, "nobody asks")
	if want := []digest.Digest{first}; !slices.Equal(got, want) {
		t.Errorf("told of %v, want %v", got, want)
	}
}
