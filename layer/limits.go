package layer

import (
	"fmt"
	"io/fs"
)

// What a layer may hold. A layer above one of these is an error that wraps [ErrLimit], never a large
// allocation: whoever asked pulls it eagerly.
const (
	// MaxEntries bounds the entries that a blob lists and the parents that they imply, those included
	// that later ones replace: five times what a full Debian desktop has, in about 150 MB of memory.
	MaxEntries = 1 << 19
	// MaxChunks bounds the chunks, at 56 bytes of memory each until the layer is packed. That is 4 TiB in eStargz's usual chunks
	// of 4 MiB.
	MaxChunks = 1 << 20
	// MaxChunkSize bounds what must be decompressed before the first of its bytes may be read, and what a reader may have to
	// hold in memory: 64 of eStargz's usual chunks.
	MaxChunkSize = 256 << 20
	// MaxDataSize bounds the data space: a quarter of the 16 TiB that ext4 lets a file be and that
	// EROFS addresses with blocks of 4 KiB and 32 bits.
	MaxDataSize = 4 << 40
	// MaxName and MaxPath are Linux's NAME_MAX, and PATH_MAX without the NUL. MaxPath holds for names of entries and for
	// targets of symlinks.
	MaxName = 255
	MaxPath = 4095
	// MaxXattrName, MaxXattrValue and MaxXattrList are Linux's XATTR_NAME_MAX, XATTR_SIZE_MAX and XATTR_LIST_MAX; the last
	// bounds the names of one inode, each with a NUL.
	MaxXattrName  = 255
	MaxXattrValue = 64 << 10
	MaxXattrList  = 64 << 10
	// MaxMajor and MaxMinor are what the kernel's dev_t holds in 12 and 20 bits.
	MaxMajor = 1<<12 - 1
	MaxMinor = 1<<20 - 1
)

// What is wrong with a layer. All of them wrap [fs.ErrInvalid], and come in an [EntryError].
var (
	// ErrName is a name that no filesystem takes, or that leads out of the layer.
	ErrName = Invalid("invalid name")
	// ErrAttr is an attribute that no inode of its type has.
	ErrAttr = Invalid("invalid attribute")
	// ErrParent is an entry below something that isn't a directory. containerd's applier follows
	// symlinks there; a Builder doesn't.
	ErrParent = Invalid("parent is not a directory")
	// ErrLink is a hardlink that leads nowhere, in a circle or to a directory.
	ErrLink = Invalid("invalid hardlink")
	// ErrContent is a file whose chunks don't cover it, or don't fit into the blob.
	ErrContent = Invalid("invalid content")
	// ErrLimit is a layer above one of the limits.
	ErrLimit = Invalid("over a limit")
)

// Invalid returns an error that wraps [fs.ErrInvalid], of which its text says nothing: "invalid argument" is no news to who has read the rest.
func Invalid(text string) error { return &invalid{text} }

type invalid struct{ text string }

func (e *invalid) Error() string { return e.text }
func (*invalid) Unwrap() error   { return fs.ErrInvalid }

// An EntryError says which entry of a layer is wrong.
type EntryError struct {
	Name string // as the blob has it
	Err  error
}

func (e *EntryError) Error() string { return fmt.Sprintf("entry %q: %v", e.Name, e.Err) }
func (e *EntryError) Unwrap() error { return e.Err }
