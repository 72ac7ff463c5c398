package convert

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
)

// An object is a JSON object whose members keep their order and their bytes, so that what this package doesn't know goes through it
// unchanged.
type object []member

type member struct {
	key   string
	value json.RawMessage
}

// UnmarshalJSON implements json.Unmarshaler. Two members of one name are an error: readers differ in which of them they take.
func (o *object) UnmarshalJSON(p []byte) error {
	d := json.NewDecoder(bytes.NewReader(p))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return errors.Join(err, errors.New("it is no JSON object"))
	}
	*o = nil
	for d.More() {
		t, err := d.Token()
		if err != nil {
			return err
		}
		key, _ := t.(string)
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return err
		}
		if o.get(key) != nil {
			return fmt.Errorf("it has two members %q", key)
		}
		*o = append(*o, member{key, value})
	}
	_, err := d.Token()
	return err
}

// MarshalJSON implements json.Marshaler.
func (o object) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	b.WriteByte('{')
	for i, m := range o {
		if i > 0 {
			b.WriteByte(',')
		}
		key, err := encode(m.key)
		if err != nil {
			return nil, err
		}
		b.Write(key)
		b.WriteByte(':')
		b.Write(m.value)
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

// get returns a member's value, nil if there is none.
func (o object) get(key string) json.RawMessage {
	for _, m := range o {
		if m.key == key {
			return m.value
		}
	}
	return nil
}

// set gives a member a value; a new one comes last.
func (o *object) set(key string, v any) error {
	value, err := encode(v)
	if err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	for i := range *o {
		if (*o)[i].key == key {
			(*o)[i].value = value
			return nil
		}
	}
	*o = append(*o, member{key, value})
	return nil
}

func (o *object) remove(key string) {
	*o = slices.DeleteFunc(*o, func(m member) bool { return m.key == key })
}

// encode is json.Marshal without its escapes for HTML, so that bytes stay what they are.
func encode(v any) ([]byte, error) {
	switch v := v.(type) {
	case json.RawMessage:
		return v, nil
	case object:
		return v.MarshalJSON()
	case []object:
		var b bytes.Buffer
		b.WriteByte('[')
		for i, o := range v {
			if i > 0 {
				b.WriteByte(',')
			}
			p, err := o.MarshalJSON()
			if err != nil {
				return nil, err
			}
			b.Write(p)
		}
		b.WriteByte(']')
		return b.Bytes(), nil
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}
