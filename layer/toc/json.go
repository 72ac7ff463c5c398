package toc

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// A cursor reads JSON values out of a buffer, one after the other. What it returns may be part of the buffer.
type cursor struct {
	b []byte
	i int
}

// errShort says that the buffer ends before the value does.
var errShort = errors.New("unexpected end of JSON")

// maxDepth bounds how deep a value that is skipped may nest.
const maxDepth = 100

// peek returns the next byte that isn't space.
func (c *cursor) peek() (byte, error) {
	for c.i < len(c.b) {
		switch ch := c.b[c.i]; ch {
		case ' ', '\t', '\n', '\r':
			c.i++
		default:
			return ch, nil
		}
	}
	return 0, errShort
}

func (c *cursor) expect(want byte) error {
	ch, err := c.peek()
	if err != nil {
		return err
	}
	if ch != want {
		return fmt.Errorf("%q where %q was expected", ch, want)
	}
	c.i++
	return nil
}

// more goes to the next element of what end ends, and reports whether there is one.
func (c *cursor) more(first bool, end byte) (bool, error) {
	ch, err := c.peek()
	if err != nil {
		return false, err
	}
	if ch == end {
		c.i++
		return false, nil
	}
	if first {
		return true, nil
	}
	return true, c.expect(',')
}

// key goes to the value of the next member of an object, if there is one.
func (c *cursor) key(first bool) (key []byte, ok bool, err error) {
	if ok, err = c.more(first, '}'); !ok || err != nil {
		return nil, false, err
	}
	if key, err = c.string(); err != nil {
		return nil, false, err
	}
	return key, true, c.expect(':')
}

// null reports whether the next value is null, and if so is behind it.
func (c *cursor) null() (bool, error) {
	if ch, err := c.peek(); ch != 'n' {
		return false, err
	}
	return true, c.literal("null")
}

func (c *cursor) literal(want string) error {
	rest := c.b[c.i:]
	if len(rest) < len(want) {
		return errShort
	}
	if string(rest[:len(want)]) != want {
		return fmt.Errorf("%.10q where %q was expected", rest, want)
	}
	c.i += len(want)
	return nil
}

// string reads a string, or null as an empty one.
func (c *cursor) string() ([]byte, error) {
	if null, err := c.null(); null || err != nil {
		return nil, err
	}
	if err := c.expect('"'); err != nil {
		return nil, err
	}
	rest := c.b[c.i:]
	end := bytes.IndexByte(rest, '"')
	if end < 0 {
		return nil, errShort
	}
	if bytes.IndexByte(rest[:end], '\\') < 0 {
		c.i += end + 1
		return rest[:end:end], nil
	}
	return c.escaped()
}

// escaped reads the rest of a string that has escapes.
func (c *cursor) escaped() ([]byte, error) {
	var s []byte
	for c.i < len(c.b) {
		ch := c.b[c.i]
		c.i++
		switch ch {
		case '"':
			return s, nil
		case '\\':
			if c.i == len(c.b) {
				return nil, errShort
			}
			ch = c.b[c.i]
			c.i++
			switch ch {
			case '"', '\\', '/':
				s = append(s, ch)
			case 'b':
				s = append(s, '\b')
			case 'f':
				s = append(s, '\f')
			case 'n':
				s = append(s, '\n')
			case 'r':
				s = append(s, '\r')
			case 't':
				s = append(s, '\t')
			case 'u':
				r, err := c.rune()
				if err != nil {
					return nil, err
				}
				s = utf8.AppendRune(s, r)
			default:
				return nil, fmt.Errorf("escape of %q", ch)
			}
		default:
			s = append(s, ch)
		}
	}
	return nil, errShort
}

// rune reads what follows \u, and a second half of a surrogate pair.
func (c *cursor) rune() (rune, error) {
	r, err := c.hex4()
	if err != nil || !utf16.IsSurrogate(r) {
		return r, err
	}
	const escape = `\u`
	rest := c.b[c.i:]
	if len(rest) < len(escape) {
		return 0, errShort
	}
	if string(rest[:len(escape)]) != escape {
		return utf8.RuneError, nil
	}
	behind := c.i
	c.i += len(escape)
	low, err := c.hex4()
	if err != nil {
		return 0, err
	}
	pair := utf16.DecodeRune(r, low)
	if pair == utf8.RuneError {
		c.i = behind // the other one stands for itself
	}
	return pair, nil
}

func (c *cursor) hex4() (rune, error) {
	if len(c.b)-c.i < 4 {
		return 0, errShort
	}
	n, err := strconv.ParseUint(string(c.b[c.i:][:4]), 16, 16)
	if err != nil {
		return 0, fmt.Errorf("escape of %.4q", c.b[c.i:])
	}
	c.i += 4
	return rune(n), nil
}

// int reads an integer, or null as 0.
func (c *cursor) int() (int64, error) {
	if null, err := c.null(); null || err != nil {
		return 0, err
	}
	start := c.i
	for c.i < len(c.b) {
		switch ch := c.b[c.i]; {
		case ch >= '0' && ch <= '9' || ch == '-' || ch == '+' || ch == '.' || ch == 'e' || ch == 'E':
			c.i++
			continue
		}
		n, err := strconv.ParseInt(string(c.b[start:c.i]), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%.30q is no integer", c.b[start:])
		}
		return n, nil
	}
	return 0, errShort
}

// skip goes behind the next value.
func (c *cursor) skip(depth int) error {
	ch, err := c.peek()
	if err != nil {
		return err
	}
	if depth > maxDepth {
		return errors.New("nested too deeply")
	}
	switch ch {
	case '{':
		c.i++
		for first := true; ; first = false {
			if _, ok, err := c.key(first); !ok || err != nil {
				return err
			}
			if err := c.skip(depth + 1); err != nil {
				return err
			}
		}
	case '[':
		c.i++
		for first := true; ; first = false {
			if ok, err := c.more(first, ']'); !ok || err != nil {
				return err
			}
			if err := c.skip(depth + 1); err != nil {
				return err
			}
		}
	case '"':
		_, err := c.string()
		return err
	case 't':
		return c.literal("true")
	case 'f':
		return c.literal("false")
	case 'n':
		return c.literal("null")
	}
	start := c.i
	for c.i < len(c.b) {
		switch ch := c.b[c.i]; {
		case ch >= '0' && ch <= '9' || ch == '-' || ch == '+' || ch == '.' || ch == 'e' || ch == 'E':
			c.i++
			continue
		}
		if _, err := strconv.ParseFloat(string(c.b[start:c.i]), 64); err != nil && !errors.Is(err, strconv.ErrRange) {
			return fmt.Errorf("%.30q is no value", c.b[start:])
		}
		return nil
	}
	return errShort
}

// A window moves a cursor over a stream, so that no more of it is in memory than the value at hand.
type window struct {
	cursor
	r    io.Reader
	base int64 // of the buffer in the stream
}

const (
	windowSize = 256 << 10
	// maxValue bounds an entry of the TOC: some MAX_XATTR_VALUEs in base64.
	maxValue = 4 << 20
)

// value calls parse, again with more of the stream as long as the buffer ends before the value does.
func (w *window) value(parse func(c *cursor) error) error {
	for {
		start := w.i
		err := parse(&w.cursor)
		if err == nil {
			return nil
		}
		if !errors.Is(err, errShort) {
			return fmt.Errorf("byte %d: %w", w.base+int64(w.i), err)
		}
		w.i = start
		if err := w.fill(); err != nil {
			return fmt.Errorf("byte %d: %w", w.base+int64(len(w.b)), err)
		}
	}
}

// fill reads on, after it has let go what is behind the cursor.
func (w *window) fill() error {
	rest := copy(w.b[:cap(w.b)], w.b[w.i:])
	w.base += int64(w.i)
	w.b, w.i = w.b[:rest], 0
	if rest == cap(w.b) {
		if rest >= maxValue {
			return fmt.Errorf("%w: value of over %d bytes", layer.ErrLimit, maxValue)
		}
		w.b = append(make([]byte, 0, max(windowSize, 2*rest)), w.b...)
	}
	n, err := io.ReadAtLeast(w.r, w.b[rest:cap(w.b)], 1)
	w.b = w.b[:rest+n]
	if errors.Is(err, io.EOF) {
		return errShort
	}
	return err
}

// end reads the stream to its end, where nothing but space may be.
func (w *window) end() error {
	for {
		if ch, err := w.peek(); err == nil {
			return fmt.Errorf("byte %d: %q behind the end", w.base+int64(w.i), ch)
		}
		if err := w.fill(); errors.Is(err, errShort) {
			return nil
		} else if err != nil {
			return err
		}
	}
}
