package order

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/bmatcuk/doublestar/v4"
	"github.com/opencontainers/go-digest"
)

// A List names files, the first ones first.
type List struct {
	items []item
	sum   digest.Digest
}

// An item is a path, relative to the root of the layer. Unless it is only a path, it is a glob where no entry is called so.
type item struct {
	path string
	glob string // empty when it can't be one
	// prefix is what all names begin with that match the glob.
	prefix string
}

const (
	// MaxSize is how large a list may be, in bytes.
	MaxSize = 16 << 20

	meta = `*?[{\`
)

// Parse reads a list. It is in one of the formats
//
//	# what `ctr-remote image optimize --prefetch-list` takes: a path or a glob per line
//	/usr/bin/python3
//	/usr/lib/**/*.so
//
//	["/usr/bin/python3", "/usr/lib/**/*.so"]
//
//	{"path": "usr/bin/python3", "layerIndex": 0}
//
// of which the last is what `ctr-remote image optimize --record-out` writes: an object for each file, of which only the path matters, and that is
// no glob. Objects may be in an array, too. In a glob, * and ? stand for anything but a slash, ** between slashes for any number of
// directories, and there are [a-z] and {a,b}.
func Parse(list []byte) (*List, error) {
	if len(list) > MaxSize {
		return nil, fmt.Errorf("a list of files may have %d bytes, this one has %d", MaxSize, len(list))
	}
	for _, mark := range []string{"\xff\xfe", "\xfe\xff"} {
		if bytes.HasPrefix(list, []byte(mark)) {
			return nil, errors.New("the list of files is in UTF-16; write it in UTF-8")
		}
	}
	list = bytes.TrimPrefix(list, []byte("\ufeff")) // which some editors write in front of UTF-8
	l := &List{}
	if isJSON(list) {
		if err := l.json(list); err != nil {
			return nil, err
		}
	} else {
		l.lines(list)
	}
	if len(l.items) == 0 {
		return nil, errors.New("the list of files is empty")
	}
	h := digest.SHA256.Digester()
	for _, it := range l.items {
		fmt.Fprintf(h.Hash(), "%q %q\n", it.path, it.glob)
	}
	l.sum = h.Digest()
	return l, nil
}

// Len is the number of paths and globs.
func (l *List) Len() int { return len(l.items) }

// Digest is the same for lists that do the same.
func (l *List) Digest() digest.Digest { return l.sum }

// isJSON tells a JSON document from lines, of which the first could be a glob that begins as one does.
func isJSON(list []byte) bool {
	b := bytes.TrimSpace(list)
	if len(b) == 0 {
		return false
	}
	next := bytes.TrimSpace(b[1:])
	switch {
	case len(next) == 0:
		return false
	case b[0] == '{':
		return next[0] == '"' || next[0] == '}'
	case b[0] == '[':
		return next[0] == '"' || next[0] == '{' || next[0] == ']'
	}
	return false
}

func (l *List) lines(list []byte) {
	for line := range bytes.Lines(list) {
		if line := strings.TrimSpace(string(line)); line != "" && line[0] != '#' {
			l.add(line, true)
		}
	}
}

func (l *List) json(list []byte) error {
	d := json.NewDecoder(bytes.NewReader(list))
	for n := 1; ; n++ {
		var v json.RawMessage
		if err := d.Decode(&v); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read the list of files, value %d of its JSON: %w", n, err)
		}
		values := []json.RawMessage{v}
		if v[0] == '[' {
			values = nil
			if err := json.Unmarshal(v, &values); err != nil {
				return fmt.Errorf("read the list of files: %w", err)
			}
		}
		for _, v := range values {
			if err := l.value(v); err != nil {
				return err
			}
		}
	}
}

// value adds a path in quotes, or a record of one.
func (l *List) value(v json.RawMessage) error {
	var name string
	if json.Unmarshal(v, &name) == nil && name != "" {
		l.add(name, true)
		return nil
	}
	var record struct {
		Path string `json:"path"`
	}
	if err := json.Unmarshal(v, &record); err != nil || record.Path == "" {
		return fmt.Errorf("the list of files has %.80q, want a path in quotes or an object with a path", v)
	}
	l.add(record.Path, false)
	return nil
}

func (l *List) add(name string, globs bool) {
	it := item{path: clean(name)}
	if globs && strings.ContainsAny(name, meta) && doublestar.ValidatePattern(it.path) {
		it.glob = it.path
		it.prefix = it.path[:strings.IndexAny(it.path, meta)]
	}
	l.items = append(l.items, it)
}

// matches reports whether the glob, if the item is one, stands for a name.
func (it *item) matches(name string) bool {
	if it.glob == "" || !strings.HasPrefix(name, it.prefix) {
		return false
	}
	ok, err := doublestar.Match(it.glob, name)
	return ok && err == nil
}

// clean is a path relative to the root of a layer, empty for the root itself.
func clean(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }
