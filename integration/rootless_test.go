package integration

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// asUser runs what follows its two arguments, a directory to work in and the mode of /dev/fuse, in
// RootlessKit as an ordinary user: one with subordinate ids that this machine doesn't know, made
// up in a mount namespace that ends with it.
const asUser = `
set -eu
dir=$1 mode=$2
shift 2
mount --make-rprivate /
for f in passwd group subuid subgid; do
	cp /etc/$f "$dir/$f" 2>/dev/null || : >"$dir/$f"
done
echo 'lazy:x:4242:4242::/nonexistent:/bin/sh' >>"$dir/passwd"
echo 'lazy:x:4242:' >>"$dir/group"
echo 'lazy:700000:65536' | tee -a "$dir/subuid" >>"$dir/subgid"
for f in passwd group subuid subgid; do
	[ -e /etc/$f ] || : >/etc/$f
	mount --bind "$dir/$f" /etc/$f
done
mkdir "$dir/dev" "$dir/home" "$dir/run" "$dir/tmp"
mount -t tmpfs none "$dir/dev"
mknod "$dir/dev/fuse" c 10 229
chmod "$mode" "$dir/dev/fuse"
mount --bind "$dir/dev/fuse" /dev/fuse
# The program may be where the user can't get at it.
cp "$1" "$dir/$(basename "$1")"
program=$dir/$(basename "$1")
shift
set -- "$program" "$@"
# The daemon's files are the user's. --root is below the directory that holds them.
state=$(printf '%s\n' "$@" | grep -A1 -xF -e --root | tail -n1)
chown -R 4242:4242 "$dir/home" "$dir/run" "$dir/tmp" "$(dirname "$state")"
unset SUDO_USER
USER=lazy HOME=$dir/home XDG_RUNTIME_DIR=$dir/run TMPDIR=$dir/tmp exec \
	setpriv --reuid=4242 --regid=4242 --clear-groups --inh-caps=-all \
	rootlesskit --net=host --copy-up=/etc --disable-host-loopback "$@"
`

// TestRootless builds as an ordinary user in RootlessKit, as docs/rootless.md has it: lazily with a /dev/fuse
// that the user may open, eagerly and with the reason without.
func TestRootless(t *testing.T) {
	reg := startRegistry(t, registry.Options{})
	img, _ := push(t, reg, "base:estargz", busybox(t, bigLayer(t, 16<<20)), baseimage.EStargz)
	size := imageSize(t, img)
	for _, tt := range []struct {
		name, fuseMode string
		lazy           bool
	}{
		{"lazy", "0666", true},
		{"no /dev/fuse", "0600", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			// The user has to get through to its own.
			for p := dir; p != "/"; p = filepath.Dir(p) {
				fi, err := os.Stat(p)
				if err == nil && fi.Mode()&0o005 != 0o005 {
					err = os.Chmod(p, fi.Mode().Perm()|0o055)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			reg.Log.Reset()
			d := startDaemon(t, daemon.Options{
				Config: plainHTTP(reg),
				Wrap:   []string{"unshare", "--mount", "sh", "-c", asUser, "sh", dir, tt.fuseMode},
				Args:   []string{"--rootless", "--oci-worker-no-process-sandbox"},
			})
			out := filepath.Join(t.TempDir(), "out")
			res := build(t, d, client.Solve{
				Dockerfile: "FROM " + reg.Ref("base:estargz") + " AS base\n" +
					"RUN head -c 4 /big/3 | wc -c > /count && id -u >> /count && chown 1000 /count && stat -c %u /count >> /count\n" +
					"FROM scratch\nCOPY --from=base /count /\n",
				Outputs: []string{"type=local,dest=" + out},
			})
			got, err := os.ReadFile(filepath.Join(out, "count"))
			if err != nil {
				t.Fatal(err)
			}
			if want := "4\n0\n1000\n"; string(got) != want {
				t.Errorf("the step wrote %q, want %q\n%s", got, want, res.Output())
			}
			rep := reportOf(t, res)
			if len(rep.Images) != 1 {
				t.Fatalf("lazy.report has %d images, want 1: %+v", len(rep.Images), rep)
			}
			read := blobsRead(t, reg, img)
			switch {
			case tt.lazy && (rep.Images[0].Lazy != 2 || read > size/2):
				t.Errorf("%d lazy layers, %d bytes read of %d; want 2 and less than half\n%s", rep.Images[0].Lazy, read, size, d.Logs())
			case !tt.lazy && (rep.Images[0].Lazy != 0 || read < size):
				t.Errorf("%d lazy layers, %d bytes read of %d; want none and all", rep.Images[0].Lazy, read, size)
			}
			if !tt.lazy {
				wantContains(t, "log", d.Logs(), "base images are pulled eagerly", "/dev/fuse")
			}
		})
	}
}
