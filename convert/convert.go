// Package convert makes lazy images of others: it reads an image from one repository and writes one with the same files to another, whose
// layers are of a lazily pullable [Format].
//
// A layer streams: out of the source, decompressed, into the format's writer and into an upload whose digest is known at its end. None of
// it lands on disk on the way to a registry, unless its files are put [InOrder], or the registry takes blobs in one piece only; what is in memory is bounded by the
// writers' pool. Layers are converted side by side. Whether readers take what was made is known before its upload is committed, and nothing of it is
// read back.
//
// # What becomes of what
//
// Layers that are tars of images of Linux are converted. Those that are of the format already are copied as they are, once they have
// shown that they hold what their annotation says, and so are encrypted ones, which nobody can read, those of Windows, which takes no additional
// files, and whatever else isn't a tar. Foreign layers, which have URLs, stay where they are. Docker's media types become OCI's: Docker's have no
// annotations. In a configuration, the DiffIDs change and nothing else, not even unknown fields; in manifests and indexes the descriptors,
// and what refers to their digests: subject, and vnd.docker.reference.digest of attestations. What an image's manifest looks like depends
// on the source, the format and its options alone. An image of which nothing is to be converted keeps its digest.
//
// Referrers of the source, such as signatures, are not looked for: they speak of the source's digest.
//
// # What is remembered
//
// A converted layer's descriptor says in annotations what it was made of and how. So the image that the destination names already, and
// others that [Options.Former] lists, tell which layers need not be converted again, and a [State] on the local disk does as well, also of a
// conversion that didn't come to its end. Whoever may write to any of these decides what a layer is taken for; [Options.Anew] asks none.
//
// # When it fails
//
// Manifests are written after all that they refer to, and the name of the destination last. Uploads are cancelled. Neither the source
// nor what the destination had is changed.
package convert

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"sync"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/buildkitd-lazy/buildkitd-lazy/repository"
)

// Options of [Convert]. Format is required.
type Options struct {
	// Format is what layers become.
	Format Format
	// Platforms are the images of an index that are wanted. Nil is all.
	Platforms []ocispecs.Platform
	// State, if set, remembers layers between calls.
	State *State
	// Former are images of former conversions, besides the one that the destination names.
	Former []repository.Repository
	// Anew converts layers that have been before.
	Anew bool
	// Jobs is how many layers are converted at once. 0 is the number of CPUs, and at least 2.
	Jobs int
	// Progress, if set, is told how each layer comes along. Called concurrently.
	Progress func(Update)
}

// An Update is how far a layer has come.
type Update struct {
	Layer  Layer
	Read   int64 // bytes of the source's blob
	Action Action
	Done   bool
	Err    error // why it has failed
}

// An Action is what becomes of a layer.
type Action string

// The actions.
const (
	Converted Action = "converted"
	Reused    Action = "reused" // it has been converted before, and is there
	Copied    Action = "copied"
	Present   Action = "present" // to be copied, and there already, or mounted from another repository
	Kept      Action = "kept"    // its blob is elsewhere
)

// A Layer is one of the source.
type Layer struct {
	Digest   digest.Digest `json:"digest"`
	Size     int64         `json:"size"`
	Platform string        `json:"platform"` // of the first image that has it
}

// A Result says what was done.
type Result struct {
	Ref    string        `json:"ref"`
	Digest digest.Digest `json:"digest"`
	Layers []LayerResult `json:"layers"` // each distinct one once, with what its descriptors claim
	// Absent are those of [Options.Former] that there aren't.
	Absent []string `json:"absent,omitempty"`
}

// A LayerResult says what became of a layer.
type LayerResult struct {
	Layer

	Action Action        `json:"action"`
	Lazy   bool          `json:"lazy"`             // what it has become
	Reason string        `json:"reason,omitempty"` // why it isn't converted, or isn't lazy all the same
	To     digest.Digest `json:"to"`
	ToSize int64         `json:"toSize"`
	// Lossy is a name that the format can't hold: the layer is a valid one, and not lazy.
	Lossy string `json:"lossy,omitempty"`
	// First is how many files come first, of a converted layer: see [InOrder].
	First int `json:"first,omitempty"`
}

// Convert writes what src names, converted, to dst. Errors name the layer and what to do.
func Convert(ctx context.Context, src, dst repository.Repository, opt Options) (Result, error) {
	if src.String() == dst.String() {
		return Result{}, fmt.Errorf("%s is both source and destination: give the converted image another name", src)
	}
	if opt.Jobs <= 0 {
		opt.Jobs = max(2, runtime.GOMAXPROCS(0))
	}
	if opt.Progress == nil {
		opt.Progress = func(Update) {}
	}
	c := &conversion{src: src, dst: dst, opt: opt, nodes: map[digest.Digest]*node{}, blobs: map[blobKey]*blobJob{}, known: map[memoryKey]memory{}}
	if opt.Platforms != nil {
		c.wanted = platforms.Any(opt.Platforms...)
	}
	desc, err := src.Resolve(ctx)
	if err != nil {
		return Result{}, err
	}
	root, err := c.read(ctx, desc, nil, maxDepth)
	if err != nil {
		return Result{}, err
	}
	if err := c.check(root, desc); err != nil {
		return Result{}, err
	}
	if err := dst.CheckPush(ctx); err != nil {
		return Result{}, err
	}
	if err := c.recall(ctx); err != nil {
		return Result{}, err
	}
	if err := c.moveAll(ctx); err != nil {
		return Result{}, err
	}
	if err := c.finish(ctx, root, dst.Tag()); err != nil {
		return Result{}, err
	}
	return c.result(root), nil
}

// conversion is one call of Convert.
type conversion struct {
	src, dst repository.Repository
	opt      Options
	wanted   platforms.Matcher // nil for all
	others   []string          // platforms that aren't wanted

	nodes map[digest.Digest]*node
	blobs map[blobKey]*blobJob
	order []*blobJob // as they were found
	found int        // images

	artifact string   // the type of one, which isn't an image
	absent   []string // former images that there aren't

	mu    sync.Mutex
	known map[memoryKey]memory
}

// check refuses a source without an image to convert.
func (c *conversion) check(root *node, desc ocispecs.Descriptor) error {
	switch {
	case root != nil && c.found > 0:
		return nil
	case len(c.others) > 0:
		var wanted []string
		for _, p := range c.opt.Platforms {
			wanted = append(wanted, platforms.FormatAll(p))
		}
		return fmt.Errorf("%s has no image for %q, but for %q", c.src, wanted, c.others)
	}
	return fmt.Errorf("%s is no container image, and there is nothing in it to convert: it's %s", c.src, cmp.Or(c.artifact, desc.MediaType))
}

// moveAll has all blobs at the destination when it returns without an error.
func (c *conversion) moveAll(ctx context.Context) error {
	eg, ctx := errgroup.WithContext(ctx)
	eg.SetLimit(c.opt.Jobs)
	for _, b := range c.order {
		eg.Go(func() error {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			err := c.move(ctx, b)
			told := err
			if err != nil && ctx.Err() != nil {
				// What a request that was given up says is of no use.
				err, told = context.Cause(ctx), errGivenUp
			}
			c.opt.Progress(Update{Layer: b.layer(), Action: b.action, Done: err == nil, Err: told, Read: b.read.Load()})
			return err
		})
	}
	return eg.Wait()
}

var errGivenUp = errors.New("given up")

func (c *conversion) result(root *node) Result {
	r := Result{Ref: c.dst.String(), Digest: root.now.Digest, Layers: []LayerResult{}, Absent: c.absent}
	for _, b := range c.order {
		if b.role != roleLayer {
			continue
		}
		r.Layers = append(r.Layers, LayerResult{
			Layer: b.layer(), Action: b.action, Lazy: b.lazy, Reason: b.reason, To: b.now.Digest, ToSize: b.now.Size, Lossy: b.lossy, First: b.first,
		})
	}
	return r
}

// decode is json.Unmarshal of content that a descriptor names.
func (c *conversion) decode(desc ocispecs.Descriptor, p []byte, to any) error {
	if err := json.Unmarshal(p, to); err != nil {
		return fmt.Errorf("%s of %s, %s: %w", desc.Digest, c.src, desc.MediaType, err)
	}
	return nil
}
