package config

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	bkconfig "github.com/moby/buildkit/cmd/buildkitd/config"
)

func TestLazy(t *testing.T) {
	def := Default()
	with := func(change func(*Lazy)) Lazy {
		l := def
		change(&l)
		return l
	}
	for _, tt := range []struct {
		name, in string
		want     Lazy
		err      string // the whole error
	}{
		{name: "empty file", want: def},
		{name: "no table", in: "debug = true\n[grpc]\naddress = [\"unix:///x\"]\n", want: def},
		{name: "empty table", in: "[lazy]\n", want: def},
		{name: "mount off", in: "[lazy]\nmount = \"off\"\n", want: with(func(l *Lazy) { l.Mount = MountOff })},
		{name: "mount fuse", in: "[lazy]\nmount = 'fuse'\n", want: with(func(l *Lazy) { l.Mount = MountFUSE })},
		{name: "mount empty", in: "[lazy]\nmount = ''\n", want: def},
		{name: "dotted", in: "lazy.prefetch = true\n", want: with(func(l *Lazy) { l.Prefetch = true })},
		{name: "inline", in: "lazy = {prefetch = true, background-fetch = false}\n", want: with(func(l *Lazy) { l.Prefetch, l.BackgroundFetch = true, false })},
		{name: "everything", in: `
root = "/r"
[lazy]
mount = "auto"
prefetch = true
background-fetch = false
max-size = "512MiB"
fetch-timeout = "1m30s"
mount-timeout = 7
[worker.oci]
snapshotter = "overlayfs"
`, want: Lazy{Mount: MountAuto, Prefetch: true, MaxSize: 512 << 20, FetchTimeout: 90 * time.Second, MountTimeout: 7 * time.Second}},
		{name: "size as number", in: "[lazy]\nmax-size = 65536000\n", want: with(func(l *Lazy) { l.MaxSize = 65536000 })},
		{name: "size with suffix", in: "[lazy]\nmax-size = \"4MB\"\n", want: with(func(l *Lazy) { l.MaxSize = 4 << 20 })},
		{name: "limit", in: "[lazy]\nmax-size = \"50GiB\"\n", want: with(func(l *Lazy) { l.MaxSize = 50 << 30 })},
		{name: "limit zero", in: "[lazy]\nmax-size = 0\n", want: def},
		{name: "limit too small", in: "[lazy]\nmax-size = 4096\n", err: `:2: [lazy] max-size: size "4096" is out of range; want ` + wanted["max-size"]},
		{name: "limit negative", in: "[lazy]\nmax-size = -1\n", err: `:2: [lazy] max-size: size "-1" is out of range; want ` + wanted["max-size"]},
		{name: "limit nonsense", in: "[lazy]\nmax-size = \"10%\"\n", err: `:2: [lazy] max-size: invalid size "10%"; want ` + wanted["max-size"]},

		{name: "unknown key", in: "\n[lazy]\nprefetsch = true\n", err: `:3: unknown key "prefetsch" in [lazy]; did you mean "prefetch"?`},
		{name: "underscore for dash", in: "[lazy]\nmax_size = 1\n", err: `:2: unknown key "max_size" in [lazy]; did you mean "max-size"?`},
		{name: "nothing near", in: "[lazy]\nfrobnicate-widgets = 1\n", err: `:2: unknown key "frobnicate-widgets" in [lazy]; known keys: background-fetch, fetch-timeout, max-size, mount, mount-timeout, prefetch`},
		{name: "unknown keys", in: "[lazy]\nmout = 1\n\nprefetch = true\nfetch-timout = 1\n", err: `:2: unknown key "mout" in [lazy]; did you mean "mount"?; line 5: unknown key "fetch-timout" in [lazy]; did you mean "fetch-timeout"?`},
		{name: "unknown subtable", in: "[lazy.mounts]\na = 1\n", err: `:1: unknown key "mounts" in [lazy]; did you mean "mount"?`},
		{name: "unknown dotted", in: "[lazy]\nmounts.a = 1\n", err: `:2: unknown key "mounts.a" in [lazy]; did you mean "mount"?`},
		{name: "mount unknown", in: "[lazy]\nmount = \"fues\"\n", err: `:2: [lazy] mount: unknown mount "fues"; want "auto", "erofs", "fuse" or "off"`},
		{name: "mount bool", in: "[lazy]\n\nmount = true\n", err: `:3: [lazy] mount: unknown mount "true"; want "auto", "erofs", "fuse" or "off"`},
		{name: "bool as string", in: "[lazy]\nprefetch = \"true\"\n", err: `:2: [lazy] prefetch: wrong type; want true or false`},
		{name: "bool as number", in: "[lazy]\nbackground-fetch = 1\n", err: `:2: [lazy] background-fetch: wrong type; want true or false`},
		{name: "two wrong values", in: "[lazy]\nmax-size = 1\nmount = \"on\"\n", err: `:3: [lazy] mount: unknown mount "on"; want "auto", "erofs", "fuse" or "off"; line 2: [lazy] max-size: size "1" is out of range; want ` + wanted["max-size"]},
		{name: "any case", in: "[Lazy]\nPrefetch = true\nMOUNT = \"on\"\n", err: `:3: [lazy] mount: unknown mount "on"; want "auto", "erofs", "fuse" or "off"`},
		{name: "size list", in: "[lazy]\nmax-size = [1]\n", err: `:2: [lazy] max-size: wrong type; want ` + wanted["max-size"]},
		{name: "duration nonsense", in: "[lazy]\nfetch-timeout = \"soon\"\n", err: `:2: [lazy] fetch-timeout: invalid duration "soon"; want ` + wanted["fetch-timeout"]},
		{name: "duration negative", in: "[lazy]\nmount-timeout = \"-1s\"\n", err: `:2: [lazy] mount-timeout: duration "-1s" is out of range; want ` + wanted["mount-timeout"]},
		{name: "duration wraps", in: "[lazy]\nmount-timeout = 9223372036854775807\n", err: `:2: [lazy] mount-timeout: duration "9223372036854775807" is out of range; want ` + wanted["mount-timeout"]},
		{name: "not a table", in: "debug = true\nlazy = true\n", err: `:2: lazy is a table; write [lazy] on a line of its own and its keys below`},
		{name: "array of tables", in: "[[lazy]]\nmount = \"off\"\n", err: `:1: lazy is a table; write [lazy] on a line of its own and its keys below`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg, err := Parse([]byte(tt.in))
			if tt.err != "" {
				if err == nil || err.Error() != tt.err {
					t.Fatalf("got error %v\nwant %s", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if cfg.Lazy != tt.want {
				t.Errorf("got %+v\nwant %+v", cfg.Lazy, tt.want)
			}
		})
	}
}

// Every key has a description for its errors, and every description a key.
func TestKeysAreTheTable(t *testing.T) {
	var fields []string
	for f := range reflect.TypeFor[lazyTable]().Fields() {
		fields = append(fields, f.Tag.Get("toml"))
	}
	for _, f := range fields {
		if wanted[f] == "" {
			t.Errorf("key %q has no description", f)
		}
	}
	if len(fields) != len(Keys()) {
		t.Errorf("keys are %v, table has %v", Keys(), fields)
	}
}

// Outside [lazy] the file means what it means to stock buildkitd, unknown keys included.
func TestRestIsUpstream(t *testing.T) {
	const text = `
debug = true
root = "/foo"
unknown-to-all = 1
[grpc]
  address = ["tcp://0.0.0.0:1", "unix:///a"]
  gid = 7
[worker.oci]
  enabled = true
  gc = false
  max-parallelism = 3
  [worker.oci.labels]
    "a.b" = "c"
[[worker.oci.gcpolicy]]
  keepDuration = "48h"
  reservedSpace = "10%"
[registry."docker.io"]
  mirrors = ["m.example"]
  http = true
[lazyness]
  of = "nobody's business"
[lazy]
  prefetch = true
[history]
  maxEntries = 0
`
	want, err := bkconfig.Load(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	got, err := Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got.BuildKit, want) {
		t.Errorf("got %+v\nwant %+v", got.BuildKit, want)
	}
	if len(got.Warnings) != 0 {
		t.Errorf("warnings: %q", got.Warnings)
	}
}

func TestMisspeltTableIsAWarning(t *testing.T) {
	cfg, err := Parse([]byte("[lasy]\nmount = \"off\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	if len(cfg.Warnings) != 1 || !strings.Contains(cfg.Warnings[0], "line 1: unknown table [lasy]") {
		t.Errorf("warnings: %q", cfg.Warnings)
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()

	cfg, err := Load(filepath.Join(dir, "none.toml"))
	if err != nil || cfg.Found || cfg.Lazy != Default() {
		t.Errorf("missing file: %+v, %v", cfg, err)
	}

	path := filepath.Join(dir, "buildkitd.toml")
	for _, tt := range []struct{ in, want string }{
		{"[lazy]\nmounts = 1\n", path + `:2: unknown key "mounts" in [lazy]; did you mean "mount"?`},
		{"a = \n", path + ":1: "},
		{"debug = 7\n", path + ":1: "},
		{"[lazy]\n[lazy]\n", path + ":2: "},
	} {
		if err := os.WriteFile(path, []byte(tt.in), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Load(path)
		if err == nil || !strings.HasPrefix(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: got %v, want prefix %s", tt.in, err, tt.want)
		}
	}

	if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("a directory: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		"", "[lazy]\n", "[lazy]\nmount = \"off\"\n", "lazy.max-size = \"1MiB\"\n", "[[lazy]]\n", "lazy = 1\n", "[lazy]\nmount = {a = 1}\n",
		"[lazy]\nfetch-timeout = 1e9\n", "[lazy]\nmount-timeout = 1979-05-27\n", "[lazy]\nmounts.x.y = []\n", "[lazy.lazy]\n[lasy]\n",
		"[lazy]\nmax-size = \"9999999999GB\"\n", "[worker.oci]\ngc = true\n[lazy]\nprefetch = false # \xff\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		cfg, err := Parse(data)
		if err != nil {
			if !strings.HasPrefix(err.Error(), ":") || strings.Contains(err.Error(), "\n") {
				t.Fatalf("error %q is not one line that a path can precede", err)
			}
			return
		}
		l := cfg.Lazy
		if _, err := ParseMount(l.Mount); err != nil || l.Mount == "" {
			t.Errorf("mount %q got through", l.Mount)
		}
		if l.MaxSize != 0 && l.MaxSize < MinMaxSize {
			t.Errorf("max-size %d got through", l.MaxSize)
		}
		for _, d := range []time.Duration{l.FetchTimeout, l.MountTimeout} {
			if d < 0 || d > MaxTimeout {
				t.Errorf("duration %v got through", d)
			}
		}
	})
}
