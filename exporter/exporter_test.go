package exporter

import (
	"context"
	"maps"
	"strings"
	"testing"

	bkexporter "github.com/moby/buildkit/exporter"
)

func TestCheck(t *testing.T) {
	type attrs = map[string]string
	for name, c := range map[string]struct {
		kind  string
		attrs attrs
		add   attrs  // what check fills in
		err   string // all of its words, separated by "|"
	}{
		"nothing":                {"image", nil, nil, ""},
		"gzip":                   {"image", attrs{"compression": "gzip", "compression-level": "9"}, nil, ""},
		"default is gzip":        {"oci", attrs{"compression-level": "-2"}, nil, ""},
		"zstd":                   {"docker", attrs{"compression": "zstd", "compression-level": "22"}, nil, ""},
		"estargz":                {"image", attrs{"compression": "estargz"}, attrs{"oci-mediatypes": "true"}, ""},
		"estargz for docker":     {"docker", attrs{"compression": "estargz", "force-compression": "true"}, attrs{"oci-mediatypes": "true"}, ""},
		"estargz, types given":   {"oci", attrs{"compression": "estargz", "oci-mediatypes": "1"}, nil, ""},
		"docker's types":         {"image", attrs{"compression": "gzip", "oci-mediatypes": "false"}, nil, ""},
		"types are nonsense":     {"image", attrs{"compression": "estargz", "oci-mediatypes": "perhaps"}, nil, ""}, // BuildKit's to refuse
		"unknown compression":    {"image", attrs{"compression": "lzma", "compression-level": "99"}, nil, "compression=lzma is unknown|uncompressed, gzip, estargz, zstd, zstdchunked"},
		"local has no layers":    {"local", attrs{"compression": "estargz", "oci-mediatypes": "false", "compression-level": "x"}, nil, ""},
		"estargz, docker's":      {"image", attrs{"compression": "estargz", "oci-mediatypes": "false"}, nil, "compression=estargz|conflicts|oci-mediatypes=false|annotations|leave oci-mediatypes out"},
		"gzip level too high":    {"image", attrs{"compression-level": "10"}, nil, "compression-level=10|gzip has levels -2 to 9"},
		"estargz level too low":  {"oci", attrs{"compression": "estargz", "compression-level": "-3"}, nil, "compression-level=-3|estargz has levels"},
		"zstd level too high":    {"oci", attrs{"compression": "zstd", "compression-level": "23"}, nil, "zstd has levels 0 to 22"},
		"level is no number":     {"image", attrs{"compression-level": "best"}, nil, `compression-level="best"|no number`},
		"level of uncompressed":  {"image", attrs{"compression": "uncompressed", "compression-level": "3"}, nil, "compression-level=3|conflicts|compression=uncompressed|leave one"},
		"chunk sizes":            {"image", attrs{"compression": "estargz", "oci-mediatypes": "true", "estargz-chunk-size": "1MiB", "estargz-min-chunk-size": "0"}, nil, ""},
		"chunks of gzip":         {"image", attrs{"compression": "gzip", "estargz-chunk-size": "1MiB"}, nil, "estargz-chunk-size=1MiB|for compression=estargz only"},
		"chunks of nothing":      {"oci", attrs{"estargz-min-chunk-size": "1"}, nil, "estargz-min-chunk-size=1|for compression=estargz only"},
		"chunks too small":       {"image", attrs{"compression": "estargz", "estargz-chunk-size": "4095"}, nil, "estargz-chunk-size=4095|out of range|4096 to 67108864"},
		"chunks too large":       {"image", attrs{"compression": "estargz", "estargz-min-chunk-size": "65MiB"}, nil, "estargz-min-chunk-size=65MiB|out of range"},
		"chunk size is nonsense": {"image", attrs{"compression": "estargz", "estargz-chunk-size": "many"}, nil, `estargz-chunk-size="many"|no size`},
		"negative chunks":        {"image", attrs{"compression": "estargz", "estargz-min-chunk-size": "-1"}, nil, `estargz-min-chunk-size="-1"|no size`},
		"unknown of estargz":     {"docker", attrs{"compression": "estargz", "estargz-chunks": "1"}, nil, `unknown attribute "estargz-chunks"|docker exporter|estargz-chunk-size`},
		"estargz for files":      {"tar", attrs{"estargz-chunk-size": "1MiB"}, nil, `unknown attribute "estargz-chunk-size"|tar exporter|no layers`},
		"unknown attribute":      {"image", attrs{"lazy-profile": "x"}, nil, `unknown attribute "lazy-profile"|image exporter`},
		"unknown, for any type":  {"local", attrs{"lazy-b": "", "lazy-a": ""}, nil, `"lazy-a"|local exporter`},
		"a list":                 {"oci", attrs{"compression": "estargz", "oci-mediatypes": "true", "lazy-prioritize": "a/list"}, nil, ""},
		"list of a context":      {"docker", attrs{"compression": "estargz", "lazy-prioritize": "lists:/a"}, attrs{"oci-mediatypes": "true"}, ""},
		"list for gzip":          {"image", attrs{"lazy-prioritize": "list"}, nil, "lazy-prioritize=list is for compression=estargz only"},
		"list without a name":    {"image", attrs{"compression": "estargz", "lazy-prioritize": ""}, nil, `lazy-prioritize="" names no file|in the build context`},
		"list without context":   {"image", attrs{"compression": "estargz", "lazy-prioritize": ":list"}, nil, `lazy-prioritize=":list"`},
		"external":               {"image", attrs{"compression": "estargz", "oci-mediatypes": "true", "push": "", "estargz-external-toc": ""}, nil, ""},
		"not external":           {"oci", attrs{"compression": "estargz", "oci-mediatypes": "true", "estargz-external-toc": "false"}, nil, ""},
		"external, what?":        {"image", attrs{"compression": "estargz", "push": "true", "estargz-external-toc": "perhaps"}, nil, `estargz-external-toc="perhaps" is neither true nor false`},
		"external for gzip":      {"image", attrs{"push": "true", "estargz-external-toc": "true"}, nil, "estargz-external-toc is for compression=estargz only"},
		"external, not pushed":   {"image", attrs{"compression": "estargz", "estargz-external-toc": "true"}, nil, "estargz-external-toc needs push=true|-esgztoc"},
		"external, by digest":    {"image", attrs{"compression": "estargz", "push": "true", "push-by-digest": "true", "estargz-external-toc": "true"}, nil, "conflicts with push-by-digest|by the image's tag"},
		"external, rewritten":    {"image", attrs{"compression": "estargz", "oci-mediatypes": "true", "push": "true", "rewrite-timestamp": "true", "estargz-external-toc": "true"}, nil, ""},
		"external in a tar":      {"oci", attrs{"compression": "estargz", "estargz-external-toc": "true"}, nil, "for the image exporter only|oci exporter has no place|NAME:TAG-esgztoc"},
		"list of files":          {"tar", attrs{"lazy-prioritize": "list"}, nil, `unknown attribute "lazy-prioritize" of the tar exporter`},
	} {
		t.Run(name, func(t *testing.T) {
			got := maps.Clone(c.attrs)
			err := check(c.kind, got)
			if c.err == "" {
				want := maps.Clone(c.attrs)
				if c.add != nil {
					maps.Copy(want, c.add)
				}
				if err != nil || !maps.Equal(got, want) {
					t.Errorf("attributes %v, %v; want %v", got, err, want)
				}
				return
			}
			if err == nil {
				t.Fatal("no error")
			}
			for part := range strings.SplitSeq(c.err, "|") {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%q does not say %q", err, part)
				}
			}
		})
	}
}

// next keeps the attributes which it is given.
type next struct{ attrs map[string]string }

func (n *next) Resolve(_ context.Context, _ int, attrs map[string]string) (bkexporter.ExporterInstance, error) {
	n.attrs = attrs
	return nil, nil
}

func TestResolve(t *testing.T) {
	var n next
	e := New("docker", &n)
	attrs := map[string]string{"compression": "estargz", "name": "x"}
	if _, err := e.Resolve(t.Context(), 0, attrs); err != nil {
		t.Fatal(err)
	}
	if n.attrs["oci-mediatypes"] != "true" || n.attrs["name"] != "x" {
		t.Errorf("attributes %v", n.attrs)
	}
	if len(attrs) != 2 {
		t.Errorf("the caller's attributes became %v", attrs)
	}
	n.attrs = nil
	if _, err := e.Resolve(t.Context(), 0, map[string]string{"lazy-x": "y"}); err == nil || n.attrs != nil {
		t.Errorf("error %v, and the exporter got %v", err, n.attrs)
	}
	if _, err := e.Resolve(t.Context(), 0, nil); err != nil {
		t.Error(err)
	}
}
