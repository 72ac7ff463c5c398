package selftest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A door that doesn't wait, and one that doesn't refuse, are told from one that works.
func TestRead(t *testing.T) {
	for name, c := range map[string]struct {
		filled []byte
		says   string
	}{
		"does not wait":   {make([]byte, size), "did not wait for its bytes"},
		"does not refuse": {content(), "success, want EIO"},
		"short":           {content()[:10], "did not wait for its bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for file, p := range map[string][]byte{"filled": c.filled, "refused": nil} {
				if err := os.WriteFile(filepath.Join(dir, file), p, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if err := Read(dir); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("Read: %v, want %q", err, c.says)
			}
		})
	}
	if err := Read(t.TempDir()); err == nil {
		t.Error("Read of nothing: no error")
	}
}

func TestFiller(t *testing.T) {
	data, err := os.Create(filepath.Join(t.TempDir(), "data"))
	if err != nil {
		t.Fatal(err)
	}
	defer data.Close()
	f := Filler{data}
	if err := f.Fill(t.Context(), size, 1); err == nil {
		t.Error("the second file was filled")
	}
	if err := f.Fill(t.Context(), 0, size); err != nil {
		t.Error(err)
	}
	if got, err := os.ReadFile(data.Name()); err != nil || string(got) != string(content()) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}
