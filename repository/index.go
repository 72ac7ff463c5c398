package repository

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	lockSuffix = ".lock"                // as BuildKit locks an index
	lockFor    = 10 * time.Second       // is how long another process may have it
	lockAgain  = 20 * time.Millisecond  // is how long to wait before the next try
	writtenIn  = 200 * time.Millisecond // is how long BuildKit may write it: it does so in place
	// annotationImageName is what containerd calls an image.
	annotationImageName = "io.containerd.image.name"
)

// index reads index.json. It needs no right to write there.
func (l *layout) index() (*ocispecs.Index, error) {
	for begun := time.Now(); ; time.Sleep(lockAgain) {
		p, err := os.ReadFile(filepath.Join(l.dir, ocispecs.ImageIndexFile))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil, fmt.Errorf("%s: %w: no OCI layout is there, as it has no %s", l, errdefs.ErrNotFound, ocispecs.ImageIndexFile)
		case errors.Is(err, syscall.ENOTDIR):
			return nil, fmt.Errorf("%s: it is a file, and no directory; what tar has packed, unpack first: %w", l, err)
		case err != nil:
			return nil, fmt.Errorf("%s: %w", l, err)
		}
		var index ocispecs.Index
		if err = json.Unmarshal(p, &index); err == nil {
			return &index, nil
		}
		if time.Since(begun) > writtenIn {
			return nil, fmt.Errorf("%s: %s: %w", l, ocispecs.ImageIndexFile, err)
		}
	}
}

// name gives an image a tag, which another one may have had. Who reads the index meanwhile finds either, also when the disk is full.
func (l *layout) name(ctx context.Context, desc ocispecs.Descriptor, tag string) (err error) {
	path := filepath.Join(l.dir, ocispecs.ImageIndexFile)
	unlock, err := lockFile(ctx, path+lockSuffix)
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := os.Stat(filepath.Join(l.dir, ocispecs.ImageLayoutFile)); errors.Is(err, fs.ErrNotExist) {
		if err := replace(filepath.Join(l.dir, ocispecs.ImageLayoutFile), ocispecs.ImageLayout{Version: ocispecs.ImageLayoutVersion}); err != nil {
			return err
		}
	}
	index, err := l.index()
	if errdefs.IsNotFound(err) {
		index, err = &ocispecs.Index{MediaType: ocispecs.MediaTypeImageIndex}, nil
	}
	if err != nil {
		return err
	}
	index.SchemaVersion = 2
	index.Manifests = slices.DeleteFunc(index.Manifests, func(m ocispecs.Descriptor) bool {
		return m.Annotations[ocispecs.AnnotationRefName] == tag && m.Annotations[annotationImageName] == ""
	})
	desc.Annotations = map[string]string{ocispecs.AnnotationRefName: tag}
	index.Manifests = append(index.Manifests, desc)
	return replace(path, index)
}

// replace writes a file of JSON, or leaves what was there.
func replace(path string, v any) error {
	p, err := json.Marshal(v)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+"-")
	if err != nil {
		return err
	}
	_, err = f.Write(p)
	if err = errors.Join(err, f.Chmod(0o644), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// lockFile locks a file that is there only while somebody has it, as BuildKit does, but waits for who has.
func lockFile(ctx context.Context, path string) (unlock func(), err error) {
	for begun := time.Now(); ; {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o644)
		if err != nil {
			return nil, fmt.Errorf("lock: %w", err)
		}
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil || unlockable(err) {
			// Who had it before may have removed it meanwhile.
			mine, merr := f.Stat()
			there, terr := os.Stat(path)
			if merr == nil && terr == nil && os.SameFile(mine, there) {
				return func() {
					_ = os.Remove(path)
					f.Close()
				}, nil
			}
		}
		f.Close()
		if time.Since(begun) > lockFor {
			return nil, fmt.Errorf("%s is locked by another process: %w; try again when that has ended", path, errors.Join(err, errdefs.ErrUnavailable))
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(lockAgain):
		}
	}
}

// unlockable reports whether the filesystem has no locks. Nobody has any then.
func unlockable(err error) bool {
	return errors.Is(err, syscall.ENOTSUP) || errors.Is(err, syscall.ENOLCK) || errors.Is(err, syscall.ENOSYS)
}
