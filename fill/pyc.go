package fill

import (
	"encoding/binary"
	"errors"
)

// A compiled Python module is a header of 16 bytes and a code object, as the module marshal writes it: Python/marshal.c. What it
// imports is in the instructions: the level of a relative import and the names to import from the module are loaded as constants, then
// comes IMPORT_NAME. Those of functions aren't looked at: they're run later, or never.

// imported is an import statement: `import module`, or `from module import names`. A level of 1 is the package that the statement
// is in, 2 that above, and so on; 0 is what sys.path leads to.
type imported struct {
	level  int
	module string // with dots; may be empty if there is a level
	names  []string
}

const (
	pycHeader = 16
	// maxMarshal is how deep objects of a module may be nested, as in Python itself; maxImports is how many imports are looked at.
	maxMarshal = 1000
	maxImports = 1024
)

// errNotPyc is a file that isn't a compiled module, or of a version whose instructions aren't known here.
var errNotPyc = errors.New("not a compiled Python module that is understood")

// bytecode is what differs from one version of Python to the next.
type bytecode struct {
	ints                      int // of a code object, before the first object
	importName, load, prolong byte
}

// bytecodeOf returns what a module's magic number stands for: Lib/importlib/_bootstrap_external.py, Lib/opcode.py.
func bytecodeOf(magic uint16) (bytecode, bool) {
	switch {
	case magic >= 3400 && magic < 3450: // 3.8, 3.9, 3.10
		return bytecode{ints: 6, importName: 108, load: 100, prolong: 144}, true
	case magic >= 3450 && magic < 3550: // 3.11, 3.12
		return bytecode{ints: 5, importName: 108, load: 100, prolong: 144}, true
	case magic >= 3550 && magic < 3600: // 3.13
		return bytecode{ints: 5, importName: 75, load: 83, prolong: 71}, true
	}
	return bytecode{}, false
}

// parsePyc returns what a compiled module imports when it is imported itself. It believes nothing: a hostile module has the
// wrong files fetched at worst.
func parsePyc(p []byte) ([]imported, error) {
	if len(p) < pycHeader || p[2] != '\r' || p[3] != '\n' {
		return nil, errNotPyc
	}
	b, ok := bytecodeOf(binary.LittleEndian.Uint16(p))
	if !ok {
		return nil, errNotPyc
	}
	u := unmarshaler{p: p[pycHeader:], bytecode: b}
	code, ok := u.object(0).(*code)
	if !ok || u.failed {
		return nil, errNotPyc
	}
	return code.imports(b), nil
}

// code is a code object.
type code struct {
	code   string
	consts []any
	names  []any
}

// imports returns the imports among the instructions.
func (c *code) imports(b bytecode) (list []imported) {
	at := func(objects []any, i int) any {
		if i < len(objects) {
			return objects[i]
		}
		return nil
	}
	arg := 0
	var loaded [2]any // the level and the names, when it's an import
	for i := 0; i+1 < len(c.code) && len(list) < maxImports; i += 2 {
		arg = arg<<8&0xffffff | int(c.code[i+1])
		switch c.code[i] {
		case b.prolong:
			continue
		case b.load:
			loaded = [2]any{loaded[1], at(c.consts, arg)}
		case b.importName:
			level, _ := loaded[0].(int)
			module, ok := at(c.names, arg).(string)
			if !ok || level < 0 {
				break
			}
			im := imported{level: level, module: module}
			names, _ := loaded[1].([]any)
			for _, n := range names[:min(len(names), maxImports)] {
				if name, ok := n.(string); ok {
					im.names = append(im.names, name)
				}
			}
			list = append(list, im)
		}
		arg = 0
	}
	return list
}

// unmarshaler reads marshalled objects: integers, strings and bytes, tuples and lists, and code objects. Others it skips.
type unmarshaler struct {
	bytecode
	p      []byte
	refs   []any
	failed bool
}

// take returns the next n bytes, or as many zeros if there are too few.
func (u *unmarshaler) take(n int) []byte {
	if n < 0 || n > len(u.p) {
		u.failed = true
		return make([]byte, min(max(n, 0), 16))
	}
	p := u.p[:n]
	u.p = u.p[n:]
	return p
}

func (u *unmarshaler) int32() int { return int(int32(binary.LittleEndian.Uint32(u.take(4)))) }

// object reads an object; nil is one that is none of those, or the end of a dictionary.
func (u *unmarshaler) object(depth int) any {
	kind := u.take(1)[0]
	const isRef = 0x80 // it may be referred to later
	ref := -1
	if kind&isRef != 0 {
		ref = len(u.refs)
		u.refs = append(u.refs, nil)
	}
	if depth > maxMarshal {
		u.failed = true
	}
	if u.failed {
		return nil
	}
	v := u.value(kind&^isRef, depth+1)
	if ref >= 0 {
		u.refs[ref] = v
	}
	return v
}

// value reads what follows the type of an object.
func (u *unmarshaler) value(kind byte, depth int) any {
	switch kind {
	case 'i':
		return u.int32()
	case 's', 't', 'u', 'a', 'A':
		return string(u.take(u.int32()))
	case 'z', 'Z':
		return string(u.take(int(u.take(1)[0])))
	case ')':
		return u.objects(int(u.take(1)[0]), depth)
	case '(', '[', '<', '>':
		return u.objects(u.int32(), depth)
	case 'c':
		return u.code(depth)
	case 'r':
		if i := u.int32(); i >= 0 && i < len(u.refs) {
			return u.refs[i]
		}
		u.failed = true
	case 'l': // digits of 15 bits, and as many as the absolute value says
		n := u.int32()
		u.take(2 * max(n, -n))
	case 'g', 'I':
		u.take(8)
	case 'y':
		u.take(16)
	case 'f':
		u.take(int(u.take(1)[0]))
	case 'x':
		u.take(int(u.take(1)[0]))
		u.take(int(u.take(1)[0]))
	case '0', 'N', 'T', 'F', 'S', '.':
	default:
		u.failed = true
	}
	return nil
}

func (u *unmarshaler) objects(n, depth int) []any {
	if n < 0 || n > len(u.p) {
		u.failed = true
		return nil
	}
	var list []any // as long as there is something for it, not as long as it says
	for len(list) < n && !u.failed {
		list = append(list, u.object(depth))
	}
	return list
}

func (u *unmarshaler) code(depth int) *code {
	u.take(4 * u.ints)
	c := &code{}
	c.code, _ = u.object(depth).(string)
	c.consts, _ = u.object(depth).([]any)
	c.names, _ = u.object(depth).([]any)
	for range 5 { // names of variables, of the file and its own
		u.object(depth)
	}
	u.take(4) // the first line
	u.object(depth)
	if u.ints == 5 {
		u.object(depth) // exceptions, since 3.11
	}
	return c
}
