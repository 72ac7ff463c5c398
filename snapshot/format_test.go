package snapshot

import (
	"testing"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
)

func TestParseFormat(t *testing.T) {
	at := zstdchunked.Position{Offset: 100, Size: 20}
	for in, want := range map[string]format{
		"":                                  {},
		FormatEStargz:                       {name: FormatEStargz},
		FormatLabel(at):                     {FormatZstdChunked, at},
		FormatLabel(at) + ":30":             {FormatZstdChunked, at},
		FormatLabel(zstdchunked.Position{}): {name: FormatZstdChunked},
	} {
		if f, err := parseFormat(in); err != nil || f != want {
			t.Errorf("%q: %+v, %v", in, f, err)
		}
	}
	for _, in := range []string{"nydus", "zstd:chunked@", "zstd:chunked@here"} {
		if f, err := parseFormat(in); err == nil {
			t.Errorf("%q: %+v", in, f)
		}
	}
}
