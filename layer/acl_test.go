package layer_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// acl makes an ACL of entries: tag, permissions and ID.
func acl(entries ...[3]uint32) string {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, 2)
	for _, e := range entries {
		b = le.AppendUint32(le.AppendUint16(le.AppendUint16(b, uint16(e[0])), uint16(e[1])), e[2])
	}
	return string(b)
}

// An ACL is what the kernel makes of it when it's set and then the mode, which is how containerd's applier does it.
func TestACL(t *testing.T) {
	const user, named, group, namedGroup, mask, other = 1, 2, 4, 8, 16, 32
	none := ^uint32(0)
	usual := [][3]uint32{{user, 7, none}, {named, 5, 1000}, {group, 5, none}, {mask, 5, none}, {other, 4, none}}
	acls := map[string]string{
		"nothing": "", "empty": acl(), "short": "bad", "odd": acl(usual...)[:20], "version": "\x01\x00\x00\x00", "usual": acl(usual...),
		"the mode": acl([3]uint32{user, 7, none}, [3]uint32{group, 5, none}, [3]uint32{other, 5, none}),
		"masked":   acl([3]uint32{user, 7, none}, [3]uint32{group, 5, none}, [3]uint32{mask, 1, none}, [3]uint32{other, 5, none}),
		"groups": acl([3]uint32{user, 6, none}, [3]uint32{named, 6, 1}, [3]uint32{named, 4, 2}, [3]uint32{group, 4, none},
			[3]uint32{namedGroup, 7, 7}, [3]uint32{namedGroup, 7, 8}, [3]uint32{mask, 7, none}, [3]uint32{other, 0, none}),
		"no mask":  acl([3]uint32{user, 7, none}, [3]uint32{named, 5, 1}, [3]uint32{group, 5, none}, [3]uint32{other, 4, none}),
		"no other": acl(usual[:4]...),
		"order":    acl(usual[1], usual[0], usual[2], usual[3], usual[4]),
		"wide":     acl([3]uint32{user, 15, none}, [3]uint32{group, 5, none}, [3]uint32{other, 4, none}),
		"nobody":   acl(usual[0], [3]uint32{named, 5, none}, usual[2], usual[3], usual[4]),
	}
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range 2000 {
		var list [][3]uint32
		for tag := uint32(user); tag <= other; tag <<= 1 {
			for n := rng.IntN(8); n > 0; n = (n - 1) * rng.IntN(2) * rng.IntN(2) {
				id := none
				if tag == named || tag == namedGroup {
					id = rng.Uint32N(3)
				}
				list = append(list, [3]uint32{tag, rng.Uint32N(8), id})
			}
		}
		if n := len(list); n > 1 && rng.IntN(4) == 0 {
			i, j := rng.IntN(n), rng.IntN(n)
			list[i], list[j] = list[j], list[i]
		}
		acls[fmt.Sprint("random ", i)] = acl(list...)
	}
	taken := 0
	for name, value := range acls {
		for _, key := range []string{"system.posix_acl_access", "system.posix_acl_default"} {
			mode := rng.Uint32N(0o1000) | 0o400
			path := filepath.Join(t.TempDir(), "d")
			if err := os.Mkdir(path, 0o755); err != nil {
				t.Fatal(err)
			}
			want := ""
			set := unix.Setxattr(path, key, []byte(value), 0)
			if set == nil || errors.Is(set, unix.EOPNOTSUPP) { // which the applier ignores
				set = nil
				if err := unix.Chmod(path, mode); err != nil {
					t.Fatal(err)
				}
				b := make([]byte, 4096)
				if n, err := unix.Getxattr(path, key, b); err == nil {
					want = string(b[:n])
					taken++
				} else if !errors.Is(err, unix.ENODATA) {
					t.Fatal(err)
				}
			}
			l, err := build(layer.BuilderOptions{}, dir("d", attr(func(in *layer.Inode) { in.Mode = unix.S_IFDIR | mode }), xattr(key, value)))
			if (err != nil) != (set != nil) || err != nil && !errors.Is(err, layer.ErrAttr) {
				t.Fatalf("%s, %s %x: got %v, and the kernel says %v", name, key, value, err, set)
			}
			got := ""
			if err == nil {
				for _, x := range l.Inodes[1].Xattrs {
					got += string(x.Value)
				}
			}
			if got != want {
				t.Fatalf("%s, %s with mode %o\n of %x\ngot %x\nwant %x", name, key, mode, value, got, want)
			}
		}
	}
	if taken < 500 {
		t.Errorf("%d ACLs were taken, so this says little", taken)
	}
}
