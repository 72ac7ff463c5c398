package config

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/agext/levenshtein"
	"github.com/docker/go-units"
	bkconfig "github.com/moby/buildkit/cmd/buildkitd/config"
	"github.com/pelletier/go-toml/v2"
)

// lazyTable is the [lazy] table on its way in. Strings and numbers arrive as text and are judged by their keys
// afterwards: the decoder has a line number for an error of a string's UnmarshalText, but none for a number's.
type lazyTable struct {
	Mount           text  `toml:"mount"`
	Prefetch        bool  `toml:"prefetch"`
	BackgroundFetch *bool `toml:"background-fetch"`
	FetchTimeout    text  `toml:"fetch-timeout"`
	MountTimeout    text  `toml:"mount-timeout"`
	MaxSize         text  `toml:"max-size"`
}

// text is a string, or any other scalar as it is written. The zero value is an absent key.
type text struct {
	set   bool
	value string
}

func (t *text) UnmarshalText(b []byte) error {
	t.set, t.value = true, string(b)
	return nil
}

// wanted says what each key of the table takes, in the words of an error message.
var wanted = map[string]string{
	"mount":            `"auto", "erofs", "fuse" or "off"`,
	"prefetch":         "true or false",
	"background-fetch": "true or false",
	"fetch-timeout":    `a number of seconds or a string such as "30s", up to 24h, or 0 for the default`,
	"max-size":         `a number of bytes or a string such as "50GiB", at least 1MiB, or 0 for no limit`,
	"mount-timeout":    `a number of seconds or a string such as "30s", up to 24h, or 0 for the default`,
}

// Keys returns the keys of the [lazy] table, sorted.
func Keys() []string { return slices.Sorted(maps.Keys(wanted)) }

func parseLazy(data []byte) (Lazy, []string, error) {
	lines, warnings, err := lazyLines(data)
	if err != nil {
		return Lazy{}, nil, err
	}
	var doc struct {
		Lazy lazyTable `toml:"lazy"`
	}
	if err := toml.Unmarshal(data, &doc); err != nil {
		return Lazy{}, nil, located(err)
	}
	t := doc.Lazy
	lazy := Default()
	lazy.Prefetch = t.Prefetch
	if t.BackgroundFetch != nil {
		lazy.BackgroundFetch = *t.BackgroundFetch
	}
	err = errors.Join(
		assign(&lazy.Mount, t.Mount, ParseMount, "mount", lines),
		assign(&lazy.FetchTimeout, t.FetchTimeout, parseDuration, "fetch-timeout", lines),
		assign(&lazy.MaxSize, t.MaxSize, parseMaxSize, "max-size", lines),
		assign(&lazy.MountTimeout, t.MountTimeout, parseDuration, "mount-timeout", lines),
	)
	if err != nil {
		return Lazy{}, nil, errors.New(strings.ReplaceAll(err.Error(), "\n:", "; line "))
	}
	return lazy, warnings, nil
}

// assign sets *to to what parse makes of a key's text; an absent key leaves it alone.
func assign[T any](to *T, t text, parse func(string) (T, error), key string, lines map[string]int) error {
	if !t.set {
		return nil
	}
	v, err := parse(t.value)
	if err != nil {
		return fmt.Errorf(":%d: [lazy] %s: %w; want %s", lines[key], key, err, wanted[key])
	}
	*to = v
	return nil
}

// lazyLines returns the line of every key of the [lazy] table, and warnings about tables which were meant to be it.
// A key that does not exist is an error.
//
// It decodes into nothing, strictly: the decoder then lists every key of the document with its position. Keys
// outside [lazy] are BuildKit's to judge.
func lazyLines(data []byte) (map[string]int, []string, error) {
	var nothing struct {
		Lazy struct{} `toml:"lazy"`
	}
	err := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields().Decode(&nothing)
	var listed *toml.StrictMissingError
	if err != nil && !errors.As(err, &listed) {
		return nil, nil, located(err)
	}
	if listed == nil {
		return nil, nil, nil
	}
	lines := map[string]int{}
	var unknown, warnings []string
	for i := range listed.Errors {
		line, _ := listed.Errors[i].Position()
		key := listed.Errors[i].Key()
		switch {
		case len(key) > 1 && strings.EqualFold(key[0], "lazy"):
			name := strings.ToLower(key[1]) // the decoder matches keys without regard to case
			if wanted[name] != "" {
				lines[name] = line
				continue
			}
			unknown = append(unknown, fmt.Sprintf("%d: unknown key %q in [lazy]%s", line, strings.Join(key[1:], "."), suggest(name)))
		case len(key) > 0 && misspelt(key[0]):
			warnings = append(warnings, fmt.Sprintf("line %d: unknown table [%s] is ignored; did you mean [lazy]?", line, key[0]))
		}
	}
	if len(unknown) > 0 {
		return nil, nil, errors.New(":" + strings.Join(unknown, "; line "))
	}
	return lines, slices.Compact(warnings), nil
}

// located turns a decoder's error into ":<line>: what is wrong".
func located(err error) error {
	var de *toml.DecodeError
	if !errors.As(err, &de) {
		return fmt.Errorf(": %w", err)
	}
	line, column := de.Position()
	msg := strings.TrimPrefix(de.Error(), "toml: ")
	if key := de.Key(); len(key) == 1 && strings.EqualFold(key[0], "lazy") {
		return fmt.Errorf(":%d: lazy is a table; write [lazy] on a line of its own and its keys below", line)
	} else if len(key) > 1 && strings.EqualFold(key[0], "lazy") {
		name := strings.ToLower(key[1])
		// The decoder describes a mismatch in terms of Go types.
		if strings.Contains(msg, "cannot decode") {
			msg = "wrong type"
		}
		return fmt.Errorf(":%d: [lazy] %s: %s; want %s", line, name, msg, wanted[name])
	}
	return fmt.Errorf(":%d: column %d: %s", line, column, msg)
}

// suggest returns the end of a sentence which names the key nearest to name, and all keys where none is near.
func suggest(name string) string {
	keys := Keys()
	best, at := "", 0
	for _, k := range keys {
		if d := levenshtein.Distance(name, k, nil); best == "" || d < at {
			best, at = k, d
		}
	}
	if at > max(len(name), len(best))/2 {
		return "; known keys: " + strings.Join(keys, ", ")
	}
	return fmt.Sprintf("; did you mean %q?", best)
}

// misspelt reports whether a top-level name is closer to "lazy" than a coincidence, and none of BuildKit's own.
func misspelt(name string) bool {
	for field := range reflect.TypeFor[bkconfig.Config]().Fields() {
		if strings.EqualFold(field.Tag.Get("toml"), name) {
			return false
		}
	}
	return levenshtein.Distance(strings.ToLower(name), "lazy", nil) <= 1
}

// ParseMount checks a value of [Lazy.Mount]; the empty string is MountAuto.
func ParseMount(s string) (string, error) {
	switch s {
	case "", MountAuto:
		return MountAuto, nil
	case MountEROFS, MountFUSE, MountOff:
		return s, nil
	}
	return "", fmt.Errorf("unknown mount %q", s)
}

func parseMaxSize(s string) (int64, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		n, err = units.RAMInBytes(s)
	}
	if err != nil {
		return 0, fmt.Errorf("invalid size %q", s)
	}
	if n != 0 && n < MinMaxSize {
		return 0, fmt.Errorf("size %q is out of range", s)
	}
	return n, nil
}

func parseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil {
		// A plain number is in seconds, as in the rest of the file. It is compared before it is multiplied: the
		// product of a large one wraps around.
		n, nerr := strconv.ParseInt(s, 10, 64)
		switch {
		case nerr != nil:
			return 0, fmt.Errorf("invalid duration %q", s)
		case n < 0 || n > int64(MaxTimeout/time.Second):
			return 0, fmt.Errorf("duration %q is out of range", s)
		}
		d = time.Duration(n) * time.Second
	}
	if d < 0 || d > MaxTimeout {
		return 0, fmt.Errorf("duration %q is out of range", s)
	}
	return d, nil
}
