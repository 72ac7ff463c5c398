package fill

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// programWith makes an ELF file with libraries, that others are among the strings of.
func programWith(name string, size int, strs []string, needed ...string) entry {
	p := elfOf(size, "/lib/none", "", needed...)
	copy(p[4096:], "\x00"+strings.Join(strs, "\x00")+"\x00")
	return entry{name: name, content: p}
}

func TestWhatAProgramRunsIsFetchedWithIt(t *testing.T) {
	im := treeOf(t, apart(
		entry{name: "usr/bin/cc", target: "x86-cc-1"}, entry{name: "usr/bin/as", target: "x86-as"}, entry{name: "usr/bin/size", target: "x86-size"},
		programWith("usr/bin/x86-cc-1", 60_000, []string{"/usr/lib/cc/", "/usr/lib", "collect", "%{!S:\n\t as %(asm)}", "print the size", "big", "more", "none", "deep", "ld.y"}),
		programWith("usr/bin/x86-as", 60_000, nil, "libbfd.so"), programWith("usr/bin/x86-size", 60_000, nil),
		programWith("usr/bin/more", 60_000, nil), // of another family
		programWith("usr/lib/cc/x86/1/collect", 60_000, []string{"ld.x"}, "libc.so"),
		programWith("usr/lib/cc/x86/1/big", 2*largeHelper, nil), programWith("usr/lib/cc/x86/1/2/deep", 60_000, nil),
		programWith("usr/lib/other/none", 60_000, nil), programWith("usr/bin/ld.x", 400_000, nil, "libld.so"),
		programWith("usr/bin/ld.y", 400_000, nil), // which the driver may only mention
		entry{name: "usr/lib/libbfd.so", content: elfOf(50_000, "", "")}, entry{name: "usr/lib/libc.so", content: elfOf(50_000, "", "")},
		entry{name: "usr/lib/libld.so", content: elfOf(50_000, "", "")},
	)...)
	check := func(t *testing.T, l *lab) {
		t.Helper()
		time.Sleep(2 * time.Second)
		for name, want := range map[string]bool{
			"usr/bin/x86-as": true, "usr/lib/libbfd.so": true, "usr/lib/cc/x86/1/collect": true, "usr/lib/libc.so": true, "usr/bin/ld.x": true, "usr/lib/libld.so": true,
			"usr/bin/x86-size": false, "usr/bin/more": false, "usr/lib/cc/x86/1/big": false, "usr/lib/cc/x86/1/2/deep": false, "usr/lib/other/none": false,
		} {
			if l.has(t, name) != want {
				t.Errorf("%s was fetched: %t, want %t", name, !want, want)
			}
		}
		l.s.mu.Lock()
		defer l.s.mu.Unlock()
		for name, want := range map[string]evidence{"usr/bin/ld.x": runs, "usr/bin/ld.y": mentioned} {
			i, err := im.Lookup(name)
			if err != nil {
				t.Fatal(err)
			}
			if got := l.guesses[im.Chunks[im.Inodes[i].FirstChunk].Frame]; got != want {
				t.Errorf("%s was fetched for %d, want %d", name, got, want)
			}
		}
	}
	t.Run("when it is read", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s, l := labs(t, im)
			defer s.Close()
			l[0].readHead(t, "usr/bin/x86-cc-1")
			check(t, l[0])
		})
	})
	t.Run("not while all is read", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s, l := labs(t, im)
			defer s.Close()
			s.mu.Lock()
			s.reader = l[0].Filler
			s.mu.Unlock()
			l[0].readHead(t, "usr/bin/x86-cc-1")
			time.Sleep(2 * time.Second)
			for _, name := range []string{"usr/bin/x86-as", "usr/lib/cc/x86/1/collect"} {
				if l[0].has(t, name) {
					t.Errorf("%s was fetched", name)
				}
			}
		})
	})
	t.Run("when it is expected", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s, l := labs(t, im)
			defer s.Close()
			l[0].Expect([]Expected{{Paths: []string{"usr/bin/cc"}}})
			check(t, l[0])
		})
	})
}

// What is fetched because a program might run it, and isn't, is bounded.
func TestProgramsThatOthersRunAreBounded(t *testing.T) {
	files := []entry{far("opt/far")}
	strs := []string{"/usr/lib/cc"}
	for i := range maxMentioned {
		name := fmt.Sprintf("pass%d", i)
		files = append(files, programWith("usr/lib/cc/"+name, largeHelper/2, nil), far("opt/"+name))
		strs = append(strs, name)
	}
	im := treeOf(t, append(files, programWith("usr/bin/cc", 60_000, strs))...)
	synctest.Test(t, func(t *testing.T) {
		s, l := labs(t, im)
		defer s.Close()
		l[0].readHead(t, "usr/bin/cc")
		time.Sleep(5 * time.Second)
		if n := l[0].Stats().Guessed; n < 1<<20 || n > 3<<20 {
			t.Errorf("%d bytes were fetched of programs that might be run", n)
		}
	})
}
