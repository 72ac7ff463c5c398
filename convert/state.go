package convert

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/buildkitd-lazy/buildkitd-lazy/repository"
)

// What a converted layer's descriptor says of it.
const (
	annotationFrom = "io.github.buildkitd-lazy.converted-from" // the digest of what it was made of
	annotationBy   = "io.github.buildkitd-lazy.converted-by"   // Format.Key
)

// memoryKey is what a conversion depends on: the source's blob, and the format's key; and of a layer that is of the format already, what it claims.
type memoryKey struct {
	from digest.Digest
	by   string
}

// lazyKey is that of a layer which is of the format, as it claims. Without that, or with another claim, nobody has looked at it.
func (c *conversion) lazyKey(blob digest.Digest, claim string) memoryKey {
	return memoryKey{blob, c.opt.Format.Key() + " toc=" + claim}
}

// A memory is a layer that was converted, or that was found to be of the format already.
type memory struct {
	From   digest.Digest `json:"from"`
	By     string        `json:"by"`
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"`
	DiffID digest.Digest `json:"diffID"`
	// Annotations are the format's.
	Annotations map[string]string `json:"annotations,omitempty"`
	Lossy       string            `json:"lossy,omitempty"`
	Unusable    string            `json:"unusable,omitempty"` // why readers don't take its table of contents
	// At are repositories where it was seen, the last one first.
	At []string `json:"at,omitempty"`
}

// valid reports whether a memory can be what it says: it may come from a file or manifest of anybody's. A blob that has become itself has the annotations
// by which it's lazy.
func (m *memory) valid() bool {
	return m.Digest.Validate() == nil && m.DiffID.Validate() == nil && m.Size > 0 && (m.Digest != m.From || len(m.Annotations) > 0)
}

// formatsOwn are the annotations of a layer that say what its blob is like.
func formatsOwn(l ocispecs.Descriptor) map[string]string {
	own := maps.Clone(l.Annotations)
	maps.DeleteFunc(own, func(k, _ string) bool { return !ofFormat(k) })
	return own
}

// A State is a directory with a small file for each layer that was converted. It is safe for concurrent use, by several processes too. What
// is lost of it is converted again.
type State struct{ dir string }

// keepFor is how long a layer that nobody asks for is remembered.
const keepFor = 90 * 24 * time.Hour

// OpenState makes the directory if need be, and forgets what nobody has asked for in three months.
func OpenState(dir string) (*State, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("directory of what was converted: %w", err)
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("directory of what was converted: %w", err)
	}
	for _, f := range files {
		if !ours.MatchString(f.Name()) {
			continue // the directory may be anybody's
		}
		if st, err := f.Info(); err == nil && time.Since(st.ModTime()) > keepFor {
			_ = os.Remove(filepath.Join(dir, f.Name())) // it takes a few hundred bytes
		}
	}
	return &State{dir}, nil
}

// ours are the names of files that a State writes: see path and put.
var ours = regexp.MustCompile(`^([0-9a-f]{64}\.json|new-[0-9]+\.json\.tmp)$`)

func (s *State) path(k memoryKey) string {
	return filepath.Join(s.dir, digest.FromString(k.from.String()+"\n"+k.by).Encoded()+".json")
}

// get returns what is remembered; a file that can't be read is as none.
func (s *State) get(k memoryKey) (m memory, ok bool) {
	path := s.path(k)
	p, err := os.ReadFile(path)
	if err != nil || json.Unmarshal(p, &m) != nil || m.From != k.from || m.By != k.by || !m.valid() {
		return memory{}, false
	}
	now := time.Now()
	_ = os.Chtimes(path, now, now) // it is worth keeping
	return m, true
}

func (s *State) put(m memory) error {
	p, err := encode(m)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(s.dir, "new-*.json.tmp")
	if err != nil {
		return fmt.Errorf("remember layer %s: %w", m.From, err)
	}
	_, err = f.Write(p)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), s.path(memoryKey{m.From, m.By}))
	}
	if err != nil {
		return fmt.Errorf("remember layer %s: %w", m.From, errors.Join(err, os.Remove(f.Name())))
	}
	return nil
}

// remember keeps what has become of a layer, for this conversion and the next ones.
func (c *conversion) remember(m memory) {
	if c.opt.State == nil {
		return
	}
	seen := append([]string{repository.Name(c.dst)}, m.At...)
	if before, ok := c.opt.State.get(memoryKey{m.From, m.By}); ok && before.Digest == m.Digest {
		seen = append(seen, before.At...) // it's there as well
	}
	var at []string
	for _, a := range seen {
		if a != "" && !slices.Contains(at, a) && len(at) < maxAt {
			at = append(at, a)
		}
	}
	m.At = at
	_ = c.opt.State.put(m) // the image isn't worse for it
}

// maxAt is in how many repositories a layer is looked for.
const maxAt = 8

// remembered returns what has become of a blob before.
func (c *conversion) remembered(k memoryKey) (memory, bool) {
	if c.opt.Anew {
		return memory{}, false
	}
	c.mu.Lock()
	m, ok := c.known[k]
	c.mu.Unlock()
	if c.opt.State == nil || ok {
		return m, ok
	}
	return c.opt.State.get(k)
}

// recall learns from former images which layers they were made of.
func (c *conversion) recall(ctx context.Context) error {
	if c.opt.Anew {
		return nil
	}
	for _, former := range append([]repository.Repository{c.dst}, c.opt.Former...) {
		desc, err := former.Resolve(ctx)
		if err == nil {
			err = c.recallFrom(ctx, former, desc, maxDepth)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		switch {
		case err == nil || former == c.dst:
		case errdefs.IsNotFound(err):
			c.absent = append(c.absent, former.String())
		default:
			return fmt.Errorf("learn from a former image which layers were converted: %w", err)
		}
		// A destination that can't be read, or is something else so far, has nothing to tell.
	}
	return nil
}

func (c *conversion) recallFrom(ctx context.Context, former repository.Repository, desc ocispecs.Descriptor, depth int) error {
	if depth == 0 || !images.IsIndexType(desc.MediaType) && !images.IsManifestType(desc.MediaType) {
		return nil
	}
	p, err := repository.ReadAll(ctx, former, desc, repository.MaxManifest)
	if err != nil {
		return err
	}
	var m struct {
		Config    ocispecs.Descriptor
		Layers    []ocispecs.Descriptor
		Manifests []ocispecs.Descriptor
	}
	if err := json.Unmarshal(p, &m); err != nil {
		return fmt.Errorf("%s of %s: %w", desc.Digest, former, err)
	}
	for _, child := range m.Manifests {
		if err := c.recallFrom(ctx, former, child, depth-1); err != nil {
			return err
		}
	}
	claims := func(l ocispecs.Descriptor) bool { return c.opt.Format.Claim(l) != "" }
	if !slices.ContainsFunc(m.Layers, claims) || !images.IsConfigType(m.Config.MediaType) {
		return nil
	}
	if p, err = repository.ReadAll(ctx, former, m.Config, maxConfig); err != nil {
		return err
	}
	var config ocispecs.Image
	if err := json.Unmarshal(p, &config); err != nil {
		return fmt.Errorf("%s of %s: %w", m.Config.Digest, former, err)
	}
	if len(config.RootFS.DiffIDs) != len(m.Layers) {
		return nil
	}
	for i, l := range m.Layers {
		c.recallLayer(former, l, config.RootFS.DiffIDs[i])
	}
	return nil
}

func (c *conversion) recallLayer(former repository.Repository, l ocispecs.Descriptor, diffID digest.Digest) {
	k := memoryKey{digest.Digest(l.Annotations[annotationFrom]), l.Annotations[annotationBy]}
	claim := c.opt.Format.Claim(l)
	switch {
	case k.from == "" && claim != "":
		k = c.lazyKey(l.Digest, claim) // copied
	case k.by != c.opt.Format.Key():
		return
	}
	m := memory{
		From: k.from, By: k.by, Digest: l.Digest, Size: l.Size, DiffID: diffID, Annotations: formatsOwn(l), At: []string{repository.Name(former)},
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.known[k]; !ok && m.valid() {
		c.known[k] = m
	}
}
