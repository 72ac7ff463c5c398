package exporter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"syscall"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/moby/buildkit/util/compression"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// A layerWriter writes one layer in a format, of which T says what was written; more than once, when BuildKit tries another way to make its tar
// after the first has failed.
type layerWriter[T any] struct {
	format string           // as errors call it
	takes  compression.Type // what BuildKit takes it for
	write  func(dest io.Writer, tar io.Reader) (T, error)

	mu      sync.Mutex
	written *T // the last one
	err     error
}

// open implements compression.Compressor.
func (l *layerWriter[T]) open(dest io.Writer, mediaType string) (io.WriteCloser, error) {
	t, err := compression.FromMediaType(mediaType)
	if err != nil {
		return nil, err
	}
	if t != l.takes {
		return nil, fmt.Errorf("a layer of media type %q can't be %s, which is %s", mediaType, l.format, l.takes)
	}
	l.mu.Lock()
	err = l.err
	l.mu.Unlock()
	if hopeless(err) {
		return nil, err
	}
	r, w := io.Pipe()
	s := &layerStream{PipeWriter: w, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		written, err := l.write(dest, r)
		if err != nil {
			err = fmt.Errorf("write a layer as %s: %w", l.format, err)
			r.CloseWithError(err) // whoever makes the tar learns why it isn't wanted any more
		}
		s.err = err
		l.mu.Lock()
		defer l.mu.Unlock()
		l.written, l.err = &written, err
	}()
	return s, nil
}

// last returns what was written last.
func (l *layerWriter[T]) last() (*T, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil && l.written == nil {
		return nil, fmt.Errorf("no layer has been written as %s", l.format)
	}
	return l.written, l.err
}

// label adds labels to what was written.
func (l *layerWriter[T]) label(ctx context.Context, cs content.Store, blob digest.Digest, labels map[string]string) error {
	var fields []string // the others stay
	for k := range labels {
		fields = append(fields, "labels."+k)
	}
	if _, err := cs.Update(ctx, content.Info{Digest: blob, Labels: labels}, fields...); err != nil {
		return fmt.Errorf("label layer %s, which is %s: %w", blob, l.format, err)
	}
	return nil
}

// hopeless reports whether an error is that of a tar that can't be a layer, whichever way it is made, or that there's no room for. BuildKit
// would try three ways, and the last of them doesn't say what has failed.
func hopeless(err error) bool {
	if _, ok := errors.AsType[*layer.EntryError](err); ok && !errors.Is(err, io.ErrUnexpectedEOF) {
		return true
	}
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// A layerStream is where the tar of a layer goes.
type layerStream struct {
	*io.PipeWriter
	done chan struct{}
	err  error // once done
}

// Close waits until the layer is written, or has failed; nothing is written to it afterwards.
func (s *layerStream) Close() error {
	if err := s.PipeWriter.Close(); err != nil {
		return err
	}
	<-s.done
	return s.err
}
