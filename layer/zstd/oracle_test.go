package zstd

import (
	"bytes"
	"math/rand/v2"
	"os/exec"
	"testing"
)

// Facebook's library, by its command, decompresses the same: it is what the format was made with.
func TestReadByLibzstd(t *testing.T) {
	zstd, err := exec.LookPath("zstd")
	if err != nil {
		t.Fatalf("%v; make deps installs it", err)
	}
	var want, frames []byte
	for _, in := range inputs(t) {
		want, frames = append(want, in...), Append(frames, in)
		r := rand.New(rand.NewPCG(uint64(len(in)), 5))
		for range 20 {
			if len(in) < 2 {
				break
			}
			from := r.IntN(len(in))
			piece := in[from:][:r.IntN(min(len(in)-from, 1<<r.IntN(19))+1)]
			want, frames = append(want, piece...), Append(frames, piece)
		}
	}
	cmd := exec.CommandContext(t.Context(), zstd, "-d", "-c", "-q")
	var out, said bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(frames), &out, &said
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %s", err, &said)
	}
	if !bytes.Equal(out.Bytes(), want) {
		t.Errorf("%d bytes come back as %d others", len(want), out.Len())
	}
}
