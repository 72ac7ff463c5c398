package fill

import (
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestPassesFor(t *testing.T) {
	for _, c := range []struct{ driver, args, want string }{
		{"gcc", "-O2 -Wall -static -o hello hello.c", "cc1"},
		{"gcc", "-c a.cc b.c -Ix.c", "cc1 cc1plus"},
		{"x86-g++-12", "a.c b.cpp", "cc1plus"},
		{"gcc", "-o x a.o b.s -lm", ""},
		{"gfortran", "a.F90", "f951"},
		{"gcc", "", ""},
	} {
		if got := slices.Sorted(maps.Keys(passesFor(c.driver, strings.Fields(c.args)))); !slices.Equal(got, strings.Fields(c.want)) {
			t.Errorf("%s %s runs %q, want %s", c.driver, c.args, got, c.want)
		}
	}
}

func TestLibrariesFor(t *testing.T) {
	for _, c := range []struct {
		driver, args string
		want         [][]string
	}{
		{"gcc", "-static -o x x.c", [][]string{{"libgcc.a"}, {"libc.a"}}},
		{"gcc", "-o x a.o -lz", [][]string{{"libgcc.so", "libgcc.a"}, {"libc.so", "libc.a"}, {"libz.so", "libz.a"}}},
		{"g++", "-static x.cc", [][]string{{"libgcc.a"}, {"libc.a"}, {"libstdc++.a"}, {"libm.a"}}},
		{"gcc", "-static -c x.c", nil},
		{"gcc", "-nostdlib x.c", nil},
		{"gcc", "--version", nil},
		{"gcc", "", nil},
	} {
		if got := librariesFor(c.driver, strings.Fields(c.args)); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s %s is linked with %q, want %q", c.driver, c.args, got, c.want)
		}
	}
}

// What is compiled says which of the large passes runs, and whether there are libraries to be read.
func TestWhatACommandCompilesIsInItsArguments(t *testing.T) {
	im := treeOf(t, apart(
		programWith("usr/bin/cc", 60_000, []string{"/usr/lib/gcc/", "cc1", "cc1plus", "collect2"}),
		programWith("usr/lib/gcc/x86/1/cc1", 24*largeHelper, nil, "libmpc.so"), programWith("usr/lib/gcc/x86/1/cc1plus", 24*largeHelper, nil),
		programWith("usr/lib/gcc/x86/1/collect2", 60_000, nil), entry{name: "usr/lib/libmpc.so", content: elfOf(50_000, "", "")},
		text("usr/lib/gcc/x86/1/libgcc.a", 900_000), text("usr/lib/x86/libc.a", 900_000), text("usr/lib/x86/libc.so", 900),
	)...)
	for args, want := range map[string][]string{
		"":                    nil,
		"-c a.c":              {"cc1"},
		"-static -o a a.c":    {"cc1", "libgcc.a", "libc.a"},
		"-o a a.cc":           {"cc1plus", "libgcc.a", "libc.so"},
		"-static -o a a.o -g": {"libgcc.a", "libc.a"},
	} {
		t.Run(args, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, l := labs(t, im)
				defer s.Close()
				l[0].Expect([]Expected{{Paths: []string{"usr/bin/cc"}, Args: strings.Fields(args)}})
				time.Sleep(5 * time.Second)
				for name, is := range map[string]string{
					"usr/lib/gcc/x86/1/cc1": "cc1", "usr/lib/gcc/x86/1/cc1plus": "cc1plus", "usr/lib/libmpc.so": "cc1",
					"usr/lib/gcc/x86/1/libgcc.a": "libgcc.a", "usr/lib/x86/libc.a": "libc.a", "usr/lib/x86/libc.so": "libc.so",
				} {
					if want := slices.Contains(want, is); l[0].has(t, name) != want {
						t.Errorf("%s was fetched: %t, want %t", name, !want, want)
					}
				}
				s.mu.Lock()
				defer s.mu.Unlock()
				if n := len(l[0].args); n > 0 {
					t.Errorf("the arguments of %d programs are kept", n)
				}
			})
		})
	}
}

// libc.so is no library, but says which are: they are asked for too, for who runs a compiler, and for a linker that nobody has told of.
func TestLinkerScriptsAreFollowed(t *testing.T) {
	script := "/* GNU ld script\n   Use the shared library. */\nOUTPUT_FORMAT(elf64-x86-64)\n" +
		"GROUP ( /lib/x86/libc.so.6 /usr/lib/x86/libc_nonshared.a  AS_NEEDED ( /lib64/ld.so.2 libm.so.6 ) )\n"
	im := treeOf(t, apart(
		programWith("usr/bin/cc", 60_000, []string{"/usr/lib/gcc/", "cc1", "collect2"}),
		programWith("usr/lib/gcc/x86/1/cc1", 24*largeHelper, nil), programWith("usr/lib/gcc/x86/1/collect2", 60_000, nil),
		text("usr/lib/gcc/x86/1/libgcc.a", 900_000), entry{name: "usr/lib/x86/libc.so", content: []byte(script)},
		entry{name: "lib/x86/libc.so.6", content: elfOf(50_000, "", "")}, text("usr/lib/x86/libc_nonshared.a", 50_000),
		entry{name: "lib64/ld.so.2", content: elfOf(50_000, "", "")}, entry{name: "usr/lib/x86/libm.so.6", content: elfOf(50_000, "", "")},
		text("lib/x86/libz.so.1", 50_000),
	)...)
	for name, use := range map[string]func(l *lab){
		"a command": func(l *lab) { l.Expect([]Expected{{Paths: []string{"usr/bin/cc"}, Args: strings.Fields("-o a a.c")}}) },
		"a linker":  func(l *lab) { l.readHead(t, "usr/lib/x86/libc.so") },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, l := labs(t, im)
				defer s.Close()
				use(l[0])
				time.Sleep(5 * time.Second)
				for name, want := range map[string]bool{
					"lib/x86/libc.so.6": true, "usr/lib/x86/libc_nonshared.a": true, "lib64/ld.so.2": true, "usr/lib/x86/libm.so.6": true, "lib/x86/libz.so.1": false,
				} {
					if l[0].has(t, name) != want {
						t.Errorf("%s was fetched: %t, want %t", name, !want, want)
					}
				}
			})
		})
	}
}
