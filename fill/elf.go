package fill

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"strings"
)

// elfMagic begins an ELF file. The rest of the names below are of the gABI, https://gabi.xinuos.com, and of elf(5).
const elfMagic = "\x7fELF"

const (
	elfHeader  = 64 // of a 64-bit file
	elfProgram = 56 // an entry of its program header table
	elfDynamic = 16 // an entry of its dynamic section

	ptLoad, ptDynamic, ptInterp = 1, 2, 3
	pfExec, pfWrite             = 1, 2

	dtNull, dtNeeded, dtStrtab, dtRpath, dtRunpath = 0, 1, 5, 15, 29

	// What a file states is believed up to these numbers.
	maxPrograms = 64
	maxDynamic  = 1024
	maxNeeded   = 256
	maxName     = 1024
)

// errNotELF is a file that isn't one, or of a kind that isn't looked into: one of 32 bits, say.
var errNotELF = errors.New("not an ELF file that is understood")

// part is a range of a file.
type part struct{ off, n int64 }

// elfFile is what an ELF file says of what is read when it runs, or is linked to what does.
type elfFile struct {
	interp   string   // the loader; empty for libraries, and for programs that are linked statically
	first    []part   // what the loader reads of the file itself: the dynamic section, and what it writes to
	needed   []string // libraries, as the file calls them
	constant []part   // what is only read: strings, among others
	runpath  []string // directories to look for them, before the usual ones; may begin with $ORIGIN
}

// parseELF reads an ELF file of the given size. If r lacks bytes, the error is r's, and what was found before is returned. It
// believes nothing: the worst that a hostile file can do is have the wrong bytes fetched, and not many.
func parseELF(r io.ReaderAt, size int64) (p elfFile, err error) {
	var head [elfHeader]byte
	if err := readFull(r, head[:], 0, size); err != nil {
		return p, err
	}
	const class64, little, big = 2, 1, 2
	var order binary.ByteOrder = binary.LittleEndian
	switch {
	case string(head[:4]) != elfMagic || head[4] != class64:
		return p, errNotELF
	case head[5] == big:
		order = binary.BigEndian
	case head[5] != little:
		return p, errNotELF
	}
	at, entry, n := order.Uint64(head[32:]), order.Uint16(head[54:]), order.Uint16(head[56:])
	if entry != elfProgram || n > maxPrograms {
		return p, errNotELF
	}
	table := make([]byte, int(n)*elfProgram)
	if err := readFull(r, table, int64(at), size); err != nil {
		return p, err
	}
	var dynamic part
	var interp part
	type segment struct{ addr, off, n uint64 }
	var loads []segment
	for ; len(table) > 0; table = table[elfProgram:] {
		kind, flags := order.Uint32(table), order.Uint32(table[4:])
		s := segment{off: order.Uint64(table[8:]), addr: order.Uint64(table[16:]), n: order.Uint64(table[32:])}
		if s.off > uint64(size) || s.n > uint64(size)-s.off {
			return p, errNotELF
		}
		in := part{int64(s.off), int64(s.n)}
		switch kind {
		case ptLoad:
			loads = append(loads, s)
			if flags&(pfWrite|pfExec) == 0 && s.n > 0 {
				p.constant = append(p.constant, in)
			}
			if flags&pfWrite != 0 && s.n > 0 {
				p.first = append(p.first, in)
			}
		case ptDynamic:
			dynamic = in
			p.first = append(p.first, in)
		case ptInterp:
			interp = in
		}
	}
	if interp.n > 0 {
		if p.interp, err = readName(r, interp.off, interp.off+interp.n); err != nil {
			return p, err
		}
	}
	if dynamic.n < elfDynamic {
		return p, nil
	}
	entries := make([]byte, min(dynamic.n/elfDynamic, maxDynamic)*elfDynamic)
	if err := readFull(r, entries, dynamic.off, size); err != nil {
		return p, err
	}
	var names int64 = -1
	var needed, paths []uint64
	for ; len(entries) > 0; entries = entries[elfDynamic:] {
		tag, value := order.Uint64(entries), order.Uint64(entries[8:])
		if tag == dtNull {
			break
		}
		switch tag {
		case dtNeeded:
			needed = append(needed, value)
		case dtRpath, dtRunpath:
			paths = append(paths, value)
		case dtStrtab:
			for _, s := range loads {
				if value >= s.addr && value-s.addr < s.n {
					names = int64(s.off + (value - s.addr))
				}
			}
		}
	}
	if names < 0 {
		return p, nil
	}
	for _, at := range paths {
		list, err := nameAt(r, names, at, size)
		if err != nil {
			return p, err
		}
		p.runpath = append(p.runpath, strings.Split(list, ":")...)
	}
	for _, at := range needed[:min(len(needed), maxNeeded)] {
		name, err := nameAt(r, names, at, size)
		if err != nil {
			return p, err
		}
		p.needed = append(p.needed, name)
	}
	return p, nil
}

func nameAt(r io.ReaderAt, table int64, at uint64, size int64) (string, error) {
	if at >= uint64(size-table) {
		return "", errNotELF
	}
	return readName(r, table+int64(at), size)
}

// readName reads a string that ends with a zero byte, in front of end.
func readName(r io.ReaderAt, off, end int64) (string, error) {
	var buf [maxName]byte
	for n := int64(0); ; {
		m := min(n+128, end-off, maxName)
		if m <= n {
			return "", errNotELF
		}
		if err := readFull(r, buf[n:m], off+n, end); err != nil {
			return "", err
		}
		if i := bytes.IndexByte(buf[n:m], 0); i >= 0 {
			return string(buf[:n+int64(i)]), nil
		}
		n = m
	}
}

// readFull fills p with bytes of a file of the given size.
func readFull(r io.ReaderAt, p []byte, off, size int64) error {
	if off < 0 || off > size || int64(len(p)) > size-off {
		return errNotELF
	}
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return err
}
