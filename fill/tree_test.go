package fill

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// What is copied is fetched before anybody has read a byte of it, from all layers, and nothing that it mentions.
func TestWhatIsCopiedIsFetched(t *testing.T) {
	var large []entry
	for i := range 40 {
		large = append(large, text(fmt.Sprintf("usr/src/sub/dir/%d", i), 1<<20))
	}
	base := treeOf(t, append(apart(
		text("usr/src/one", 70_000), said("usr/src/sub/two.py", "import named\n"), text("usr/src/sub/named.py", 10),
		text("usr/lib/named.py", 90_000), text("usr/srcs", 90_000), text("hidden/below", 90_000), text("whole", 200_000),
	), large...)...)
	top := treeOf(t, apart(
		entry{name: "link", target: "usr/src"}, text("usr/src/three", 90_000), text("usr/other", 90_000),
		text("hidden/above", 90_000),
	)...)
	hidden, err := top.Lookup("hidden")
	if err != nil {
		t.Fatal(err)
	}
	top.Inodes[hidden].Opaque = true
	want := func(l *lab, name string, there bool) {
		t.Helper()
		if l.has(t, name) != there {
			t.Errorf("%s is there: %t, want %t", name, !there, there)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		s, l := labs(t, base, top)
		defer s.Close()
		l[0].Expect([]Expected{{Paths: []string{"usr/"}}})
		time.Sleep(time.Second)
		want(l[0], "usr/src/one", false) // who wants no background work has nothing fetched that may be in vain
		synctest.Wait()
		s.opt.Background, s.opt.Idle = true, time.Hour
		l[0].Expect([]Expected{{Paths: []string{"link/"}}, {Paths: []string{"whole/"}}, {Paths: []string{"hidden/"}}, {Paths: []string{"nothing/"}}})
		time.Sleep(20 * time.Second)
		for _, name := range []string{"usr/src/one", "usr/src/sub/two.py", "usr/src/sub/named.py", "usr/src/sub/dir/0", "usr/src/sub/dir/39", "whole"} {
			want(l[0], name, true)
		}
		want(l[1], "usr/src/three", true)
		want(l[1], "hidden/above", true)
		l[0].readHead(t, "usr/src/sub/two.py")
		time.Sleep(time.Second)
		want(l[0], "usr/lib/named.py", false)
		want(l[0], "usr/srcs", false)
		want(l[0], "hidden/below", false)
		want(l[1], "usr/other", false)
	})
}
