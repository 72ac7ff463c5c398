package layertest

import (
	"archive/tar"
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

// An Entry is one of a tar.
type Entry struct {
	tar.Header
	Content string
}

// Dir is a directory, mode 0755.
func Dir(name string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}}
}

// File is a regular file, mode 0644.
func File(name, content string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(content))}, Content: content}
}

// Symlink is a symbolic link.
func Symlink(name, target string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
}

// Link is another name of a file, mode 0644.
func Link(name, target string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644}}
}

// Char is a character device, mode 0600.
func Char(name string, major, minor int64) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeChar, Name: name, Mode: 0o600, Devmajor: major, Devminor: minor}}
}

// Block is a block device, mode 0600.
func Block(name string, major, minor int64) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeBlock, Name: name, Mode: 0o600, Devmajor: major, Devminor: minor}}
}

// Fifo is a named pipe, mode 0600.
func Fifo(name string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeFifo, Name: name, Mode: 0o600}}
}

// Perm sets the permissions, with the set-id and sticky bits.
func (e Entry) Perm(mode int64) Entry { e.Mode = mode; return e }

// Owner sets the owner and the group.
func (e Entry) Owner(uid, gid int) Entry { e.Uid, e.Gid = uid, gid; return e }

// Modified sets the time of the last change, in seconds since 1970.
func (e Entry) Modified(sec int64) Entry { e.ModTime = time.Unix(sec, 0); return e }

// Xattr adds an extended attribute.
func (e Entry) Xattr(name, value string) Entry {
	records := map[string]string{"SCHILY.xattr." + name: value}
	maps.Copy(records, e.PAXRecords)
	e.PAXRecords = records
	return e
}

// Tar makes a tar of the entries.
func Tar(t testing.TB, entries ...Entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		e.Format = tar.FormatPAX
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.Content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// capability is cap_net_raw+ep, as the kernel stores it.
const capability = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// Random makes up a layer of n entries. No two have the same name, and hardlinks have the attributes of their
// targets: programs agree on what such a layer is.
func Random(r *rand.Rand, n int) []Entry {
	var entries []Entry
	dirs := []string{""}
	taken := map[string]bool{}
	newName := func() string {
		for {
			name := dirs[r.IntN(len(dirs))] + randomName(r)
			if !taken[name] {
				taken[name] = true
				return name
			}
		}
	}
	var files []Entry
	for range n {
		var e Entry
		switch r.IntN(12) {
		case 0, 1:
			name := newName()
			dirs = append(dirs, name+"/")
			if r.IntN(4) == 0 {
				continue // an implied one, if anything comes into it
			}
			e = Dir(name + "/")
		case 2:
			e = Symlink(newName(), strings.Repeat("../", r.IntN(3))+randomName(r))
		case 3:
			e = Char(newName(), int64(r.IntN(100)+1), int64(r.IntN(1000)))
		case 4:
			e = Block(newName(), int64(r.IntN(100)), int64(r.IntN(1000)))
		case 5:
			e = Fifo(newName())
		case 6:
			if len(files) == 0 {
				continue
			}
			target := files[r.IntN(len(files))]
			e = target
			e.Typeflag, e.Name, e.Linkname, e.Size, e.Content = tar.TypeLink, newName(), target.Name, 0, ""
			entries = append(entries, e)
			continue
		case 7:
			dir := dirs[r.IntN(len(dirs))]
			e = File(dir+".wh.gone"+randomName(r), "")
			if r.IntN(3) == 0 {
				e = File(dir+".wh..wh..opq", "")
			}
			if taken[e.Name] {
				continue
			}
			taken[e.Name] = true
		default:
			e = File(newName(), randomContent(r))
		}
		e = e.Perm(int64(r.IntN(0o10000))).Owner(r.IntN(3)*1000, r.IntN(1<<20)).Modified(r.Int64N(2e9) + 1)
		if r.IntN(8) == 0 && (e.Typeflag == tar.TypeReg || e.Typeflag == tar.TypeDir) {
			e = e.Xattr("user."+randomName(r), randomName(r)).Xattr("security.capability", capability)
		}
		entries = append(entries, e)
		if e.Typeflag == tar.TypeReg && !strings.Contains(e.Name, ".wh.") {
			files = append(files, e)
		}
	}
	return entries
}

func randomName(r *rand.Rand) string {
	const odd = "abcXYZ019._-~ \\\n\t<&>\"'*é世%"
	runes := []rune(odd)
	var b strings.Builder
	for range r.IntN(12) + 1 {
		b.WriteRune(runes[r.IntN(len(runes))])
	}
	// Neither "." nor ".." nor a whiteout.
	return fmt.Sprintf("n%s", b.String())
}

// randomContent is at most 4 or 20 kB as a rule, which is many chunks where these are small, and five times as much in one file of ten.
func randomContent(r *rand.Rand) string {
	scale := 1
	if r.IntN(10) == 0 {
		scale = 5
	}
	switch r.IntN(4) {
	case 0:
		return ""
	case 1:
		return strings.Repeat("\x00", r.IntN(20_000*scale))
	case 2:
		return strings.Repeat(randomName(r), r.IntN(600*scale))
	}
	b := make([]byte, r.IntN(4_000*scale))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return string(b)
}
