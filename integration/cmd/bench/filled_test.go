package main

import (
	"encoding/json"
	"strings"
	"testing"
)

// TestMissing is about what counts as filled: nothing that is half open, and not a daemon that has pulled the image.
func TestMissing(t *testing.T) {
	for _, tt := range []struct {
		name, page string
		want       int64
		err        string
	}{
		{"all there", `{"door":"erofs","layers":[{"open":true,"filled":5,"total":5},{"open":true,"filled":0,"total":0}]}`, 0, ""},
		{"some missing", `{"layers":[{"open":true,"filled":5,"total":15},{"open":true,"filled":1,"total":2}]}`, 11, ""},
		{"being opened", `{"layers":[{"open":true,"filled":5,"total":5},{"open":false,"filled":0,"total":0}]}`, 0, "not open"},
		{"pulled", `{"layers":[]}`, 0, "no layer is lazy"},
		{"no page", `404 page not found`, 0, "/debug/lazy"},
	} {
		got, err := missingOf(json.NewDecoder(strings.NewReader(tt.page)))
		if tt.err == "" && (err != nil || got != tt.want) || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("%s: %d, %v; want %d, %q", tt.name, got, err, tt.want, tt.err)
		}
	}
}
