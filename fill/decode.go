package fill

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer"
)

// streamFrom is the size in bytes from which a frame that somebody waits for is decoded while it arrives.
const streamFrom = 128 << 10

// decoders bounds how many frames are decoded at the same time. A place is given to the most urgent; background work
// leaves one free if there are two or more.
type decoders struct {
	wg sync.WaitGroup // of the goroutines

	mu     sync.Mutex
	places int
	busy   int
	jobs   [levels][]func()
	back   [levels][]chan struct{} // who lent its place and wants one again
}

// do runs job when it has a place.
func (d *decoders) do(l level, job func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.jobs[l] = append(d.jobs[l], job)
	d.spread()
}

// lend gives the caller's place to others while it waits for something else.
func (d *decoders) lend() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.busy--
	d.spread()
}

// reclaim waits for a place after lend.
func (d *decoders) reclaim(l level) {
	d.mu.Lock()
	ch := make(chan struct{})
	d.back[l] = append(d.back[l], ch)
	d.spread()
	d.mu.Unlock()
	<-ch
}

// spread gives places to whom they are due.
func (d *decoders) spread() {
	for l := range levels {
		places := d.places
		if l == background && places > 1 {
			places--
		}
		for ; d.busy < places && len(d.back[l]) > 0; d.busy++ {
			close(d.back[l][0])
			d.back[l] = d.back[l][1:]
		}
		for ; d.busy < places && len(d.jobs[l]) > 0; d.busy++ {
			job := d.jobs[l][0]
			d.jobs[l][0] = nil
			d.jobs[l] = d.jobs[l][1:]
			d.wg.Go(func() { d.work(job) })
		}
	}
}

// work runs jobs as long as there are some.
func (d *decoders) work(job func()) {
	for job != nil {
		job()
		d.mu.Lock()
		d.busy--
		job = d.next()
		d.spread()
		d.mu.Unlock()
	}
}

// next returns the most urgent job, and its place, if nobody more urgent waits for one.
func (d *decoders) next() func() {
	for l := range levels {
		if len(d.back[l]) > 0 || l == background && d.places > 1 && d.busy+1 >= d.places {
			return nil
		}
		if len(d.jobs[l]) > 0 {
			job := d.jobs[l][0]
			d.jobs[l][0] = nil
			d.jobs[l] = d.jobs[l][1:]
			d.busy++
			return job
		}
	}
	return nil
}

// corrupt says which chunk of a frame isn't what it should be.
type corrupt struct {
	chunk int
	err   error
}

func (e *corrupt) Error() string { return e.err.Error() }
func (e *corrupt) Unwrap() error { return e.err }

// decode decompresses a frame and puts the chunks that the sink hasn't into it, each after it was verified. The error
// is a *corrupt if the bytes are wrong, else the sink's.
func (f *Filler) decode(frame int, in io.Reader) error {
	fr := &f.layer.Frames[frame]
	first, n := int(fr.FirstChunk), int(fr.NumChunks)
	zr, err := f.layer.Codec.Decompress(in)
	if err != nil {
		return &corrupt{first, fmt.Errorf("decompress: %w", err)}
	}
	defer zr.Close()
	var pos int64
	for c := first; c < first+n; c++ {
		if f.sink.Have(c) {
			continue
		}
		ch := &f.layer.Chunks[c]
		if _, err := io.CopyN(io.Discard, zr, int64(ch.Inner)-pos); err != nil {
			return &corrupt{c, fmt.Errorf("decompress: %w", err)}
		}
		if err := f.write(c, zr); err != nil {
			return err
		}
		pos = int64(ch.Inner) + ch.Size
	}
	return nil
}

// write puts a chunk that r begins with into the sink, which takes none that hasn't been verified.
func (f *Filler) write(c int, r io.Reader) error {
	size := f.layer.Chunks[c].Size
	buf := getBuffer(int(size))
	defer putBuffer(buf)
	v, err := f.layer.ReadChunk(c, r, buf)
	if _, ok := errors.AsType[*layer.DigestError](err); ok {
		return &corrupt{c, err}
	} else if errors.Is(err, layer.ErrUnreadable) {
		return err // nobody has sent anything wrong
	} else if err != nil {
		return &corrupt{c, fmt.Errorf("decompress: %w", err)}
	}
	if err := f.sink.WriteChunk(v); err != nil {
		return err
	}
	if fr := f.layer.Chunks[c].Frame; bytes.HasPrefix(v.Bytes(), []byte(elfMagic)) && f.layer.Frames[fr].FirstChunk == uint32(c) {
		f.programs.set(int(fr))
	}
	f.count.served.Add(size)
	return nil
}
