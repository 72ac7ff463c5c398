package integration

import (
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
)

// TestSameVersions compares the modules in our daemon and in the stock one: a difference
// between the two must come from what we wrote.
func TestSameVersions(t *testing.T) {
	ours, err := daemon.Bin(daemon.OursBinary)
	if err != nil {
		t.Fatal(err)
	}
	stock, err := daemon.Bin(daemon.StockBinary)
	if err != nil {
		t.Fatal(err)
	}
	shared, differ, err := daemon.SharedVersions(ours, stock)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range differ {
		t.Errorf("ours and stock link different versions: %s", d)
	}
	for module, want := range map[string]string{
		"github.com/moby/buildkit":                         "v0.33.1",
		"github.com/containerd/containerd/v2":              "v2.4.2",
		"github.com/containerd/stargz-snapshotter":         "v0.19.1",
		"github.com/containerd/stargz-snapshotter/estargz": "v0.19.1",
	} {
		if got := shared[module]; got != want {
			t.Errorf("both link %s %q, want %s", module, got, want)
		}
	}
}
