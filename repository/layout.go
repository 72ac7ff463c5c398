package repository

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// defaultTag is the one of a reference without.
const defaultTag = "latest"

// layout is an OCI layout.
type layout struct {
	dir    string
	tag    string        // "" if not given
	digest digest.Digest // "" if not given
	store  func() (content.Store, error)

	mu      sync.Mutex
	uploads int      // that have not ended
	lock    *os.File // of who has any
}

var _ Repository = (*layout)(nil)

func newLayout(s string) (*layout, error) {
	l := &layout{dir: s}
	if dir, dgst, ok := strings.Cut(s, "@"); ok {
		parsed, err := digest.Parse(dgst)
		if err != nil {
			return nil, fmt.Errorf("reference %s%s: digest %q: %w", LayoutPrefix, s, dgst, err)
		}
		l.dir, l.digest = dir, parsed
	}
	if i := strings.LastIndexByte(l.dir, ':'); i > strings.LastIndexByte(l.dir, '/') {
		l.dir, l.tag = l.dir[:i], l.dir[i+1:]
		if l.tag == "" {
			return nil, fmt.Errorf("reference %s%s: the tag is empty", LayoutPrefix, s)
		}
	}
	if l.dir == "" {
		return nil, fmt.Errorf("reference %s%s: no directory; want %sDIR[:TAG|@DIGEST]", LayoutPrefix, s, LayoutPrefix)
	}
	l.store = sync.OnceValues(func() (content.Store, error) { return local.NewStore(l.dir) })
	return l, nil
}

// String implements Repository.
func (l *layout) String() string {
	s := LayoutPrefix + l.dir
	if l.tag != "" {
		s += ":" + l.tag
	}
	if l.digest != "" {
		s += "@" + l.digest.String()
	}
	return s
}

// Tag implements Repository.
func (l *layout) Tag() string {
	if l.tag == "" && l.digest == "" {
		return defaultTag
	}
	return l.tag
}

// Resolve implements Repository. Without a tag, it's the only image or the one that is called latest.
func (l *layout) Resolve(ctx context.Context) (ocispecs.Descriptor, error) {
	index, err := l.index()
	if err != nil {
		return ocispecs.Descriptor{}, err
	}
	var tags []string
	for _, m := range index.Manifests {
		tag := m.Annotations[ocispecs.AnnotationRefName]
		if tag == l.Tag() && l.digest == "" || m.Digest == l.digest {
			return bare(m), nil
		}
		tags = append(tags, strconv.Quote(tag))
	}
	switch {
	case l.digest != "":
		return l.blobDescriptor(ctx)
	case l.tag == "" && len(index.Manifests) == 1:
		return bare(index.Manifests[0]), nil
	}
	there := "it has none"
	if len(tags) > 0 {
		there = "it has " + strings.Join(tags, ", ")
	}
	return ocispecs.Descriptor{}, fmt.Errorf("%s: %w: no image of the layout has the tag %q; %s", l, errdefs.ErrNotFound, l.Tag(), there)
}

// bare is a descriptor without what index.json says of an image.
func bare(d ocispecs.Descriptor) ocispecs.Descriptor {
	return ocispecs.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
}

// blobDescriptor is of a manifest that index.json doesn't list: one of a listed index, mostly.
func (l *layout) blobDescriptor(ctx context.Context) (ocispecs.Descriptor, error) {
	desc := ocispecs.Descriptor{Digest: l.digest}
	st, err := os.Stat(l.blobPath(l.digest))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = errdefs.ErrNotFound
		}
		return desc, fmt.Errorf("%s: %w", l, err)
	}
	desc.Size = st.Size()
	p, err := ReadAll(ctx, l, desc, MaxManifest)
	if err != nil {
		return desc, err
	}
	desc.MediaType = mediaTypeOf(p)
	return desc, nil
}

// ingest is where blobs are in the making.
func (l *layout) ingest() string { return filepath.Join(l.dir, "ingest") }

func (l *layout) blobPath(dgst digest.Digest) string {
	return filepath.Join(l.dir, ocispecs.ImageBlobsDir, dgst.Algorithm().String(), dgst.Encoded())
}

// Open implements Repository.
func (l *layout) Open(_ context.Context, desc ocispecs.Descriptor) (io.ReadCloser, error) {
	return l.open(desc)
}

// ReaderAt implements Repository.
func (l *layout) ReaderAt(_ context.Context, desc ocispecs.Descriptor) (ReaderAt, error) {
	return l.open(desc)
}

func (l *layout) open(desc ocispecs.Descriptor) (*os.File, error) {
	if err := desc.Digest.Validate(); err != nil { // it becomes a path
		return nil, fmt.Errorf("%s: digest %q: %w", l, desc.Digest, err)
	}
	f, err := os.Open(l.blobPath(desc.Digest))
	if errors.Is(err, fs.ErrNotExist) {
		err = errdefs.ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("%s: blob %s: %w", l, desc.Digest, err)
	}
	return f, nil
}

// ours reports whether a directory is a layout, or may become one: if it has anything else in it, it isn't meant to.
func (l *layout) ours() error {
	names, err := os.ReadDir(l.dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, syscall.ENOTDIR):
		return fmt.Errorf("it is a file; name a directory, which may not exist yet: %w", err)
	case err != nil:
		return err
	}
	for _, n := range names {
		switch n.Name() {
		case ocispecs.ImageLayoutFile, ocispecs.ImageIndexFile, ocispecs.ImageBlobsDir, filepath.Base(l.ingest()):
			return nil // also what is left of a conversion that was broken off
		}
	}
	if len(names) > 0 {
		return fmt.Errorf("the directory is no OCI layout, and has other files in it, such as %s; name another one, which may not exist yet", names[0].Name())
	}
	return nil
}

// CheckPush implements Repository.
func (l *layout) CheckPush(ctx context.Context) error {
	if l.digest != "" {
		return fmt.Errorf("%s: an image's digest is known only when it is made; leave it out", l)
	}
	if err := l.ours(); err != nil {
		return fmt.Errorf("%s: %w", l, err)
	}
	u, err := l.Create(ctx)
	if err != nil {
		return err
	}
	u.Cancel()
	return nil
}

// Has implements Repository.
func (l *layout) Has(_ context.Context, desc ocispecs.Descriptor) (bool, error) {
	if err := desc.Digest.Validate(); err != nil {
		return false, fmt.Errorf("%s: digest %q: %w", l, desc.Digest, err)
	}
	st, err := os.Stat(l.blobPath(desc.Digest))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && (desc.Size == 0 || st.Size() == desc.Size), err
}

// Mount implements Repository.
func (l *layout) Mount(context.Context, ocispecs.Descriptor, Repository) (bool, error) {
	return false, nil
}

// Create implements Repository.
func (l *layout) Create(ctx context.Context) (Upload, error) {
	store, err := l.store()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", l, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.uploads == 0 {
		if err := l.claim(); err != nil {
			return nil, fmt.Errorf("%s: %w", l, err)
		}
	}
	l.uploads++
	ref := ingestPrefix + rand.Text()    // nobody's who has the same process id in another container
	err = os.MkdirAll(l.ingest(), 0o755) // an upload before may have removed it
	if err == nil {
		var w content.Writer
		if w, err = store.Writer(ctx, content.WithRef(ref)); err == nil {
			return &layoutUpload{of: l, store: store, ref: ref, w: w}, nil
		}
		_ = store.Abort(context.WithoutCancel(ctx), ref) // where there is no room, there is a part of it
	}
	l.ended()
	return nil, fmt.Errorf("%s: %w", l, err)
}

// ingestPrefix begins the references of our uploads: BuildKit writes layouts, too.
const ingestPrefix = "buildkitd-lazy-upload-"

// claim locks the directory for writing to it beside others. Who is the only one to write removes what others have left that were killed.
func (l *layout) claim() (err error) {
	f, err := os.Open(l.dir)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil {
		if err := l.removeLeft(); err != nil {
			return fmt.Errorf("remove what is left of an upload: %w", err)
		}
	}
	// It waits for who does the same. Where files can't be locked nobody can, and all is left as it is.
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_SH); err != nil && !unlockable(err) {
		return fmt.Errorf("lock the directory: %w", err)
	}
	l.lock = f
	return nil
}

// removeLeft removes what others have left: of the process that was killed, or had no room on the disk, there may be a part only.
func (l *layout) removeLeft() error {
	left, err := os.ReadDir(l.ingest())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, d := range left {
		path := filepath.Join(l.ingest(), d.Name())
		ref, err := os.ReadFile(filepath.Join(path, "ref"))
		st, serr := os.Stat(path)
		unnamed := len(ref) == 0 && (err == nil || errors.Is(err, fs.ErrNotExist)) && serr == nil && time.Since(st.ModTime()) > beginsIn
		if strings.HasPrefix(string(ref), ingestPrefix) || unnamed {
			if err := os.RemoveAll(path); err != nil {
				return err
			}
		}
	}
	return nil
}

// beginsIn is how long somebody may take to write down whose upload it is.
const beginsIn = time.Minute

// ended counts an upload that has ended, with mu locked.
func (l *layout) ended() {
	if l.uploads--; l.uploads > 0 {
		return
	}
	// Readers of a layout have no use for an empty directory. Another process may have something in it.
	_ = os.Remove(l.ingest())
	l.lock.Close()
	l.lock = nil
}

// PutManifest implements Repository.
func (l *layout) PutManifest(ctx context.Context, desc ocispecs.Descriptor, manifest []byte, tag string) error {
	if err := Put(ctx, l, desc, manifest); err != nil {
		return err
	}
	if tag == "" {
		return nil
	}
	if err := l.name(ctx, desc, tag); err != nil {
		return fmt.Errorf("%s: name the image: %w", l, err)
	}
	return nil
}

// layoutUpload is a file next to the blobs.
type layoutUpload struct {
	of    *layout
	store content.Store
	ref   string
	w     content.Writer // nil once it has ended
}

// Write implements io.Writer.
func (u *layoutUpload) Write(p []byte) (int, error) {
	n, err := u.w.Write(p)
	if err != nil {
		err = fmt.Errorf("%s: %w", u.of, err)
	}
	return n, err
}

// Commit implements Upload.
func (u *layoutUpload) Commit(ctx context.Context, dgst digest.Digest, size int64) error {
	defer u.Cancel()
	if err := u.w.Commit(ctx, size, dgst); err != nil && !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("%s: blob %s: %w", u.of, dgst, err)
	}
	return nil
}

// Cancel implements Upload.
func (u *layoutUpload) Cancel() {
	if u.w == nil {
		return
	}
	u.w.Close()
	u.w = nil
	// What has been committed is gone from there.
	_ = u.store.Abort(context.Background(), u.ref)
	u.of.mu.Lock()
	defer u.of.mu.Unlock()
	u.of.ended()
}
