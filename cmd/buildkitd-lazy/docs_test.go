package main

import (
	"io"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	bkconfig "github.com/moby/buildkit/cmd/buildkitd/config"
	"github.com/urfave/cli/v3"

	"github.com/buildkitd-lazy/buildkitd-lazy/config"
)

const configurationPage = "../../docs/configuration.md"

// The configuration page names every flag of the daemon and its commands, hidden or not, and no other.
func TestDocumentedFlags(t *testing.T) {
	page := readPage(t)
	known := []string{"help", "version"} // the library's own
	app := newApp(io.Discard, io.Discard)
	for _, c := range append([]*cli.Command{app}, app.Commands...) {
		for _, f := range c.Flags {
			known = append(known, f.Names()...)
			if name := "--" + f.Names()[0]; !regexp.MustCompile("`" + name + "[` =]").MatchString(page) {
				t.Errorf("%s: %s %s is not documented", configurationPage, c.Name, name)
			}
		}
	}
	for _, m := range regexp.MustCompile("`--([a-z-]+)").FindAllStringSubmatch(page, -1) {
		if !slices.Contains(known, m[1]) {
			t.Errorf("%s: there is no flag --%s", configurationPage, m[1])
		}
	}
}

// The configuration page names every key that buildkitd.toml may have.
func TestDocumentedKeys(t *testing.T) {
	page := readPage(t)
	keys := append(keysOf(reflect.TypeFor[bkconfig.Config]()), config.Keys()...)
	if len(keys) < 80 {
		t.Errorf("only %d keys found: %q", len(keys), keys)
	}
	for _, key := range keys {
		if !strings.Contains(page, "`"+key+"`") && !strings.Contains(page, "["+key) && !strings.Contains(page, "."+key) && !strings.Contains(page, `"`+key+`"`) {
			t.Errorf("%s: key %s is not documented", configurationPage, key)
		}
	}
}

// keysOf lists the keys of a table and of the tables below it.
func keysOf(t reflect.Type) []string {
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice || t.Kind() == reflect.Map {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct {
		return nil
	}
	var keys []string
	for f := range t.Fields() {
		key, _, _ := strings.Cut(f.Tag.Get("toml"), ",")
		switch {
		case key != "":
			keys = append(keys, key)
			keys = append(keys, keysOf(f.Type)...)
		case f.Anonymous && strings.HasPrefix(f.Type.PkgPath(), "github.com/moby/buildkit"):
			keys = append(keys, keysOf(f.Type)...)
		}
	}
	return keys
}

func readPage(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(configurationPage)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
