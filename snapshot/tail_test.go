package snapshot

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
)

// asked is a Fetcher that remembers what was asked of it.
type asked struct {
	blob []byte
	log  []string
}

func (a *asked) Fetch(_ context.Context, off, n int64) (io.ReadCloser, error) {
	a.log = append(a.log, fmt.Sprintf("%d+%d", off, n))
	return io.NopCloser(bytes.NewReader(a.blob[off : off+n])), nil
}

func TestTail(t *testing.T) {
	blob := random(100)
	for name, c := range map[string]struct {
		end    int64 // of the frames
		off, n int64
		asked  string
	}{
		"in front":           {90, 0, 60, "[0+60]"},
		"inside":             {90, 70, 20, "[]"},
		"all of it":          {90, 60, 30, "[]"},
		"across its start":   {90, 50, 40, "[50+10]"},
		"across its end":     {90, 80, 15, "[80+15]"},
		"frames end earlier": {60, 70, 5, "[70+5]"},
	} {
		t.Run(name, func(t *testing.T) {
			next := &asked{blob: blob}
			f := tail{60, blob[60:]}.until(c.end).before(next)
			body, err := f.Fetch(t.Context(), c.off, c.n)
			if err != nil {
				t.Fatal(err)
			}
			defer body.Close()
			got, err := io.ReadAll(body)
			if err != nil || !bytes.Equal(got, blob[c.off:c.off+c.n]) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			if log := fmt.Sprint(next.log); log != c.asked {
				t.Errorf("asked for %s, want %s", log, c.asked)
			}
		})
	}
}

// sent is a Fetcher whose bodies say who sends them.
type sent struct{ asked }

func (s *sent) Fetch(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	body, err := s.asked.Fetch(ctx, off, n)
	return sentBody{body}, err
}

type sentBody struct{ io.ReadCloser }

func (sentBody) Source() string { return "mirror.test" }
func (sentBody) Whole() bool    { return true }

// What is in front of the tail may be corrupt, and who has sent it to blame; and it may be cut out of a whole blob.
func TestTailSaysWhereTheRestComesFrom(t *testing.T) {
	blob := random(100)
	f := tail{60, blob[60:]}.before(&sent{asked{blob: blob}})
	for off, want := range map[int64]string{0: "mirror.test", 60: ""} {
		body, err := f.Fetch(t.Context(), off, 100-off)
		if err != nil {
			t.Fatal(err)
		}
		if got := fill.SourceOf(body); got != want {
			t.Errorf("bytes from %d on are sent by %q, want %q", off, got, want)
		}
		if b, ok := body.(interface{ Whole() bool }); (ok && b.Whole()) != (want != "") {
			t.Errorf("bytes from %d on: whether they are of a whole blob is wrong", off)
		}
		body.Close()
	}
}
