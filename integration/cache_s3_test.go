package integration

import (
	"fmt"
	"net/http/httptest"
	"testing"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// TestCacheInS3 exports a build's cache to an S3 bucket, lazy base included, and imports it into a
// daemon that has nothing.
func TestCacheInS3(t *testing.T) {
	store := s3mem.New()
	if err := store.CreateBucket("cache"); err != nil {
		t.Fatal(err)
	}
	s3 := httptest.NewServer(gofakes3.New(store).Server())
	t.Cleanup(s3.Close)
	cacheIn := fmt.Sprintf("type=s3,region=lab,bucket=cache,name=lazy,use_path_style=true,endpoint_url=%s,access_key_id=lab,secret_access_key=lab", s3.URL)

	reg := startRegistry(t, registry.Options{})
	push(t, reg, "base:estargz", busybox(t, bigLayer(t, 2<<20)), baseimage.EStargz)
	dockerfile := exportDockerfile(reg.Ref("base:estargz"))
	first := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	build(t, first, client.Solve{Dockerfile: dockerfile, CacheTo: []string{cacheIn + ",mode=max"}})

	objects, err := store.ListBucket("cache", nil, gofakes3.ListBucketPage{})
	if err != nil {
		t.Fatal(err)
	}
	if len(objects.Contents) < 3 {
		t.Errorf("the bucket has %d objects, want a manifest and layers", len(objects.Contents))
	}
	second := startDaemon(t, daemon.Options{Config: plainHTTP(reg)})
	res := build(t, second, client.Solve{Dockerfile: dockerfile, CacheFrom: []string{cacheIn}})
	if run := res.Vertex("from the second step"); run == nil || !run.Cached {
		t.Errorf("the step is not cached: %+v", run)
	}
}
