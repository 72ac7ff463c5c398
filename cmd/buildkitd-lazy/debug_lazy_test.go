package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
)

type fixedStats snapshot.Stats

func (s fixedStats) LazyStats() snapshot.Stats { return snapshot.Stats(s) }

func TestDebugLazy(t *testing.T) {
	dgst := digest.Digest("sha256:" + strings.Repeat("ab", 32))
	st := snapshot.Stats{
		Summary: snapshot.Summary{
			Door: "erofs", Queue: fill.Queue{Ahead: 1500},
			Totals: snapshot.Totals{Mounted: 2, Fetched: 1_900_000, Copied: 250_000, Misses: 7, Retries: 3},
		},
		Layers: []snapshot.LayerStats{
			{
				Digest: dgst, Repository: "registry.example/team/image", Source: "mirror.example", Open: true, Filled: 2_500_000, Total: 620_000_000,
				Fetched: 1_900_000, Copied: 250_000, Hits: 4, Misses: 7, WaitSeconds: 1.25, Retries: 3, Trouble: "mirror.example answered 503", TroubleSeconds: 61.23,
			},
			{Digest: dgst, Open: true, Filled: 10, Total: 10},
			{Digest: dgst},
		},
	}
	var d debugServer
	get := func(query, accept string) *httptest.ResponseRecorder {
		t.Helper()
		req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/debug/lazy"+query, nil)
		req.Header.Set("Accept", accept)
		rec := httptest.NewRecorder()
		d.handler().ServeHTTP(rec, req)
		return rec
	}
	if rec := get("", ""); rec.Code != http.StatusServiceUnavailable {
		t.Errorf("before there is a worker: %d", rec.Code)
	}
	d.setLazy(fixedStats(st))
	for _, c := range []struct {
		query, accept string
		json          bool
	}{
		{"", "", false}, {"", "text/html, */*", false}, {"?format=text", "application/json", false},
		{"?format=json", "", true}, {"", "application/json", true},
	} {
		rec := get(c.query, c.accept)
		body := rec.Body.String()
		if !c.json {
			const want = `door     erofs
layers   2 mounted
fetched  1.9 MB
copied   250 kB not fetched, as other chunks had the same digests
served   0 B, but for what the kernel answered by itself
reads    7 waited, 0 failed
retries  3
corrupt  0
link     not measured yet, taken for 0 B/s, 0s to the first byte
queue    0 B waited for, 1.5 kB ahead, 0 B of profiles, 0 B in the background, 0 frames not looked at

LAYER  DOOR   FILLED    OF      FETCHED  COPIED  HITS  MISSES  WAITED  ERRORS  RETRIES  CORRUPT  SOURCE          REPOSITORY
DIGEST  erofs  2.5 MB    620 MB  1.9 MB   250 kB  4     7       1.25s   0       3        0        mirror.example  registry.example/team/image
DIGEST  erofs  complete  10 B    0 B      0 B     0     0       0s      0       0        0        -               
DIGEST  erofs  opening   -       0 B      0 B     0     0       0s      0       0        0        -               

last trouble of DIGEST, 1m1s ago: mirror.example answered 503
`
			if got := strings.ReplaceAll(body, dgst.String(), "DIGEST"); strings.Join(strings.Fields(got), " ") != strings.Join(strings.Fields(want), " ") {
				t.Errorf("%q, accept %q:\n%s\nwant:\n%s", c.query, c.accept, got, want)
			}
			continue
		}
		var got snapshot.Stats
		if err := json.Unmarshal([]byte(body), &got); err != nil || !reflect.DeepEqual(got, st) || rec.Header().Get("Content-Type") != "application/json" {
			t.Errorf("%q, accept %q: %v\n%s", c.query, c.accept, err, body)
		}
	}
	if rec := get("?format=xml", ""); rec.Code != http.StatusBadRequest || !strings.Contains(rec.Body.String(), "want json or text") {
		t.Errorf("format xml: %d %s", rec.Code, rec.Body)
	}
	d.setLazy(fixedStats{})
	if rec := get("", ""); !strings.Contains(rec.Body.String(), "no figures") {
		t.Errorf("without lazy layers: %s", rec.Body)
	}
}
