package layer

import (
	"fmt"
	"path"
	"strings"
)

const (
	// whiteoutPrefix and opaqueMarker are the OCI image specification's:
	// https://github.com/opencontainers/image-spec/blob/main/layer.md#whiteouts
	whiteoutPrefix = ".wh."
	opaqueMarker   = ".wh..wh..opq"
)

// cleanName makes a path relative to the root of an entry's name, "" for the root itself. Leading slashes, "./" and
// repeated slashes are habits of tar programs; ".." is none, and no two programs agree on what it means.
func cleanName(name string) (string, error) {
	clean := strings.TrimPrefix(name, "./")
	clean = strings.Trim(clean, "/")
	if len(clean) > MaxPath {
		return "", fmt.Errorf("%w: path of %d bytes", ErrName, len(clean))
	}
	if strings.IndexByte(clean, 0) >= 0 {
		return "", fmt.Errorf("%w: NUL in it", ErrName)
	}
	usual := true
	for part := range strings.SplitSeq(clean, "/") {
		switch {
		case part == "..":
			return "", fmt.Errorf("%w: leads upwards", ErrName)
		case part == "" || part == ".":
			usual = false
		case len(part) > MaxName:
			return "", fmt.Errorf("%w: %d bytes between slashes", ErrName, len(part))
		}
	}
	if !usual {
		clean = strings.TrimPrefix(path.Clean("/"+clean), "/")
	}
	return clean, nil
}

// splitName returns the directory of a clean path and the name in it.
func splitName(clean string) (dir, base string) {
	i := strings.LastIndexByte(clean, '/')
	return clean[:max(i, 0)], clean[i+1:]
}

// hiddenBy returns the name in the layers below that a whiteout hides.
func hiddenBy(base string) (string, error) {
	switch hidden := base[len(whiteoutPrefix):]; hidden {
	case "", ".", "..":
		return "", fmt.Errorf("%w: whiteout of %q", ErrName, hidden)
	default:
		return hidden, nil
	}
}

// An arena keeps short strings in few allocations, apart from the longer ones that they may be parts of.
type arena struct {
	block strings.Builder
}

const arenaBlock = 8 << 10

func (a *arena) keep(s string) string {
	if len(s) > a.block.Cap()-a.block.Len() {
		a.block.Reset()
		a.block.Grow(max(len(s), arenaBlock))
	}
	start := a.block.Len()
	a.block.WriteString(s)
	return a.block.String()[start:]
}
