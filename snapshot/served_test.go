package snapshot

import (
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

func TestImpliedOf(t *testing.T) {
	b := layer.NewBuilder(layer.BuilderOptions{})
	for name, mode := range map[string]uint32{"usr/lib/a/f": unix.S_IFREG, "usr/lib/b/c/f": unix.S_IFREG, "opt": unix.S_IFDIR, "opt/x/y": unix.S_IFDIR} {
		if err := b.Add(name, layer.Inode{Mode: mode | 0o755}); err != nil {
			t.Fatal(err)
		}
	}
	l, err := b.Build(0, nil)
	if err != nil {
		t.Fatal(err)
	}
	got := impliedOf(l)
	slices.Sort(got)
	if want := []string{"/opt/x", "/usr", "/usr/lib", "/usr/lib/a", "/usr/lib/b", "/usr/lib/b/c"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
