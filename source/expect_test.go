package source

import (
	"reflect"
	"testing"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
)

// What a step will read is asked for as soon as the whole image is mounted, and once.
func TestExpectedWhenTheImageIsMounted(t *testing.T) {
	b := newBench(t, "lazy0", "lazy1")
	var got [][]fill.Expected
	b.Snapshotter.opt.Expect = func(layer digest.Digest, files []fill.Expected) {
		if layer != digest.FromString("lazy1") {
			t.Errorf("the layer mounted last is %s", layer)
		}
		got = append(got, files)
	}
	b.Expect("registry.test/other:latest", []fill.Expected{{Paths: []string{"bin/other"}}})
	b.Expect(b.plan.ref, []fill.Expected{{Paths: []string{"bin/sh"}}})
	b.Expect(b.plan.ref, []fill.Expected{{Paths: []string{"sbin/cc", "bin/cc"}, Args: []string{"x.c"}}})
	if err := b.prepare(t.Context(), 0); !cerrdefs.IsAlreadyExists(err) || len(got) > 0 {
		t.Fatalf("%v, asked for %q before all is mounted", err, got)
	}
	if n, err := b.prepareAll(); n != 2 || err != nil {
		t.Fatalf("%d layers, %v", n, err)
	}
	if _, err := b.prepareAll(); err != nil {
		t.Fatal(err)
	}
	if want := [][]fill.Expected{{{Paths: []string{"bin/sh"}}, {Paths: []string{"sbin/cc", "bin/cc"}, Args: []string{"x.c"}}}}; !reflect.DeepEqual(got, want) {
		t.Errorf("asked for %q, want %q", got, want)
	}
}

// Builds that are cached mount nothing: what they would have read doesn't pile up.
func TestExpectationsAreBounded(t *testing.T) {
	b := newBench(t, "lazy0")
	for range 1000 {
		b.Expect(b.plan.ref, []fill.Expected{{Paths: []string{"bin/sh"}}})
	}
	for i := range 1000 {
		b.Expect(digest.FromBytes([]byte{byte(i), byte(i >> 8)}).String(), nil)
	}
	if n, files := len(b.expected.byRef), len(b.expected.byRef[b.plan.ref].files); n > keepExpectations || files > maxExpected {
		t.Errorf("%d images, %d files", n, files)
	}
}
