// Package config reads buildkitd.toml.
//
// The file is BuildKit's own, read by BuildKit's own decoder, so every key outside the [lazy] table means exactly
// what it means to stock buildkitd, and a key that BuildKit ignores stays ignored. The [lazy] table is ours and is
// decoded strictly: a key that does not exist, a value of the wrong type and a value out of range are errors which
// name the file and the line, and, for a key, the known key nearest to it.
//
// A file that does not exist is an empty file, as it is to stock buildkitd. Load does no I/O but that one read, and
// the values it returns are safe to copy.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	bkconfig "github.com/moby/buildkit/cmd/buildkitd/config"
)

// The values of [Lazy.Mount].
const (
	MountAuto  = "auto"  // the best door this host offers
	MountEROFS = "erofs" // the kernel door, or no start
	MountFUSE  = "fuse"  // the FUSE door, or no start
	MountOff   = "off"   // no lazy layers: pull and unpack as stock buildkitd does
)

// Limits of the values in the [lazy] table.
const (
	MinMaxSize = 1 << 20 // bytes; less than many a table of contents takes
	MaxTimeout = 24 * time.Hour
)

// Config is one buildkitd.toml.
type Config struct {
	BuildKit bkconfig.Config // everything outside [lazy], without any default filled in
	Lazy     Lazy            // the [lazy] table, with defaults

	// Found is false where the file does not exist.
	Found bool

	// Warnings are sentences about likely mistakes outside [lazy], where a mistake is not an error.
	Warnings []string
}

// Lazy is the [lazy] table of buildkitd.toml.
type Lazy struct {
	// Mount is the way a reader gets at a lazy layer: MountAuto (default), MountEROFS, MountFUSE or MountOff. Key "mount".
	Mount string

	// Prefetch fetches, when a layer is mounted, what precedes the prefetch landmark in it. Default false: only what
	// is read, and what reading it suggests, is fetched. Key "prefetch".
	Prefetch bool

	// BackgroundFetch goes on to fetch the rest of layers that something was read of, while no step runs and nothing else is fetched. Default
	// true. Key "background-fetch".
	BackgroundFetch bool

	// FetchTimeout is how long a ranged read goes on trying, at the registry and its mirrors, without a byte arriving;
	// then the reader gets an error. Up to MaxTimeout. Zero (default) is the door's built-in limit. Key
	// "fetch-timeout": a number of seconds, or a string such as "30s".
	FetchTimeout time.Duration

	// MountTimeout limits opening a layer, which is reading its table of contents; past it the layer is pulled
	// eagerly. Up to MaxTimeout. Zero (default) is the door's built-in limit. Key "mount-timeout", like
	// "fetch-timeout".
	MountTimeout time.Duration

	// MaxSize is how many bytes of disk lazy layers may take, at least MinMaxSize. Above it, those that no build uses are
	// dropped, least recently used first, and fetched again when they are used; those in use may take more. Zero (default)
	// is no limit but BuildKit's GC policy. Key "max-size": a number of bytes, or a string such as "50GiB".
	MaxSize int64
}

// Default returns the [lazy] table of an empty file.
func Default() Lazy { return Lazy{Mount: MountAuto, BackgroundFetch: true} }

// Load reads the file at path. Errors are one line, begin with the path and carry the line number where there is one.
func Load(path string) (Config, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Config{Lazy: Default()}, nil
	}
	if err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	cfg, err := Parse(data)
	if err != nil {
		return Config{}, fmt.Errorf("%s%w", path, err)
	}
	cfg.Found = true
	return cfg, nil
}

// Parse decodes the text of a buildkitd.toml. The text of an error begins with ":<line>: " where the line is known
// and with ": " elsewhere, so that a path can be put in front of it.
func Parse(data []byte) (Config, error) {
	lazy, warnings, err := parseLazy(data)
	if err != nil {
		return Config{}, err
	}
	bk, err := bkconfig.Load(bytes.NewReader(data))
	if err != nil {
		return Config{}, located(err)
	}
	return Config{BuildKit: bk, Lazy: lazy, Warnings: warnings}, nil
}
