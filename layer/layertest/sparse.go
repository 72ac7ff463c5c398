package layertest

import (
	"os/exec"
	"testing"
)

// Sparse are tars in all formats that GNU tar has for sparse files, by their names: with a file before and one behind "hole", which has a megabyte of
// content on either side of a terabyte that isn't there. It needs GNU tar.
func Sparse(t testing.TB) map[string][]byte {
	t.Helper()
	dir := t.TempDir()
	run := func(script string) []byte {
		t.Helper()
		c := exec.CommandContext(t.Context(), "sh", "-ec", script)
		c.Dir = dir
		out, err := c.Output()
		if err != nil {
			t.Fatalf("%s: %v", script, err)
		}
		return out
	}
	run(`echo first >first; echo last >last
		dd if=/dev/urandom of=hole bs=1M count=1
		truncate -s 1T hole
		dd if=/dev/urandom of=hole bs=1M count=1 oflag=append conv=notrunc`)
	tars := map[string][]byte{"gnu": run("tar --sparse --format=gnu -c first hole last")}
	for _, version := range []string{"0.0", "0.1", "1.0"} {
		tars[version] = run("tar --sparse --format=posix --sparse-version=" + version + " -c first hole last")
	}
	// The file that is read last, as what is behind it is checked otherwise.
	tars["at the end"] = run("tar --sparse --format=posix -c first hole")
	return tars
}
