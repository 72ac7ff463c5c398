package fill

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
)

// elfOf makes an ELF file of a program or, without an interp, of a library: headers, strings, some bytes, and a dynamic section
// at the end, in a segment that is written to.
func elfOf(size int, interp, runpath string, needed ...string) []byte {
	const names = 512
	var strtab bytes.Buffer
	strtab.WriteByte(0)
	name := func(s string) uint64 {
		at := strtab.Len()
		strtab.WriteString(s + "\x00")
		return uint64(at)
	}
	var dyn []elf.Dyn64
	for _, lib := range needed {
		dyn = append(dyn, elf.Dyn64{Tag: int64(elf.DT_NEEDED), Val: name(lib)})
	}
	if runpath != "" {
		dyn = append(dyn, elf.Dyn64{Tag: int64(elf.DT_RUNPATH), Val: name(runpath)})
	}
	dyn = append(dyn, elf.Dyn64{Tag: int64(elf.DT_STRTAB), Val: 0x1000 + names}, elf.Dyn64{})
	loader := name(interp)
	last := uint64(size - 16*len(dyn))
	progs := []elf.Prog64{
		{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R), Off: 0, Vaddr: 0x1000, Filesz: last},
		{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_W), Off: last, Vaddr: 0x2000 + last, Filesz: uint64(size) - last},
		{Type: uint32(elf.PT_DYNAMIC), Flags: uint32(elf.PF_R | elf.PF_W), Off: last, Filesz: uint64(size) - last},
	}
	if interp != "" {
		progs = append(progs, elf.Prog64{Type: uint32(elf.PT_INTERP), Off: names + loader, Filesz: uint64(len(interp) + 1)})
	}
	h := elf.Header64{Phoff: 64, Phentsize: 56, Phnum: uint16(len(progs)), Ehsize: 64, Type: uint16(elf.ET_DYN), Version: 1}
	copy(h.Ident[:], elf.ELFMAG)
	h.Ident[elf.EI_CLASS], h.Ident[elf.EI_DATA], h.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1
	var head, tail bytes.Buffer
	for _, v := range []any{h, progs} {
		_ = binary.Write(&head, binary.LittleEndian, v)
	}
	_ = binary.Write(&tail, binary.LittleEndian, dyn)
	p := make([]byte, size)
	for i := range p {
		p[i] = byte(i * 7)
	}
	copy(p, head.Bytes())
	copy(p[names:], strtab.Bytes())
	copy(p[last:], tail.Bytes())
	return p
}

func TestParseELF(t *testing.T) {
	p := elfOf(100_000, "/lib64/ld.so", "$ORIGIN/../lib:/opt/lib", "libc.so.6", "libm.so.6")
	got, err := parseELF(bytes.NewReader(p), int64(len(p)))
	if err != nil {
		t.Fatal(err)
	}
	if got.interp != "/lib64/ld.so" || !slices.Equal(got.needed, []string{"libc.so.6", "libm.so.6"}) ||
		!slices.Equal(got.runpath, []string{"$ORIGIN/../lib", "/opt/lib"}) {
		t.Errorf("got %+v", got)
	}
	if len(got.first) == 0 || got.first[0].off+got.first[0].n != int64(len(p)) {
		t.Errorf("the loader reads %v first, want the end of the file", got.first)
	}
	// The beginning says already where to read on.
	got, err = parseELF(bytes.NewReader(p[:4096]), int64(len(p)))
	if !errors.Is(err, io.EOF) || len(got.first) == 0 || got.interp == "" || len(got.needed) > 0 {
		t.Errorf("of the first block: %+v, %v", got, err)
	}
	if _, err := parseELF(strings.NewReader("#!/bin/sh"), 9); !errors.Is(err, errNotELF) {
		t.Errorf("a script: %v", err)
	}
}

// debug/elf, which reads what the linker has written and trusts it, says the same.
func TestParseELFAgainstDebugELF(t *testing.T) {
	for _, name := range []string{"/bin/sh", "/usr/bin/env", "/usr/bin/python3"} {
		raw, err := os.ReadFile(name)
		if err != nil || !bytes.HasPrefix(raw, []byte(elfMagic)) {
			continue // another system
		}
		f, err := elf.NewFile(bytes.NewReader(raw))
		if err != nil {
			t.Fatal(err)
		}
		want, err := f.ImportedLibraries()
		if err != nil {
			t.Fatal(err)
		}
		got, err := parseELF(bytes.NewReader(raw), int64(len(raw)))
		if err != nil || !slices.Equal(got.needed, want) {
			t.Errorf("%s needs %q (%v), want %q", name, got.needed, err, want)
		}
	}
}

func FuzzParseELF(f *testing.F) {
	f.Add(elfOf(2000, "/lib/ld.so", "/opt", "libc.so.6"))
	f.Add(elfOf(1000, "", "", "a", "b"))
	f.Fuzz(func(t *testing.T, p []byte) {
		got, err := parseELF(bytes.NewReader(p), int64(len(p)))
		for _, in := range got.first {
			if in.off < 0 || in.n < 0 || in.off+in.n > int64(len(p)) {
				t.Errorf("part %+v of %d bytes", in, len(p))
			}
		}
		if err == nil && len(got.needed) > maxNeeded {
			t.Errorf("%d libraries", len(got.needed))
		}
	})
}
