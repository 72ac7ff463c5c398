package blob

import (
	"io"
	"net/http"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

// avoidFor is how long a host is asked after the others that was silent, or ignored a range: whoever reads next
// needn't find out again.
const avoidFor = 30 * time.Second

// avoid has a host asked after the others for so long at least.
func (r *Reader) avoid(host string, d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.avoided == nil {
		r.avoided = map[string]time.Time{}
	}
	if until := time.Now().Add(d); until.After(r.avoided[host]) {
		r.avoided[host] = until
	}
}

// order returns the hosts in the order to ask them, the one that is to blame for corrupt bytes behind all others.
func (r *Reader) order(hosts []docker.RegistryHost, blamed string) []docker.RegistryHost {
	if len(hosts) < 2 {
		return hosts
	}
	hosts = slices.Clone(hosts)
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	place := func(h docker.RegistryHost) int {
		switch {
		case h.Host == blamed:
			return 2
		case now.Before(r.avoided[h.Host]):
			return 1
		}
		return 0
	}
	slices.SortStableFunc(hosts, func(a, b docker.RegistryHost) int { return place(a) - place(b) })
	return hosts
}

// AcceptWhole lets the Reader take what it needs out of a whole blob where no host serves ranges. It's for a
// layer that is being read, and for which it is too late to be pulled. All that is in front of a range is received, and
// dropped; a read goes on for as long as it comes further than before.
func (r *Reader) AcceptWhole() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.whole = true
}

func (r *Reader) acceptsWhole() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.whole
}

// cutOut returns the bytes from off to end of a whole blob.
func (r *Reader) cutOut(resp *http.Response, off, end int64) (io.ReadCloser, error) {
	if size := resp.ContentLength; size > 0 {
		if err := r.checkSize(resp, size); err != nil {
			return nil, err
		}
	}
	return &cutting{ReadCloser: resp.Body, skip: off, left: end - off}, nil
}

// cutting drops the first bytes. Its Read returns no bytes and no error for each part that it drops, so that its reader
// sees that they arrive.
type cutting struct {
	io.ReadCloser
	skip, left int64
}

// Read implements io.Reader.
func (c *cutting) Read(p []byte) (int, error) {
	if c.skip > 0 {
		n, err := c.ReadCloser.Read(p[:min(int64(len(p)), c.skip)])
		c.skip -= int64(n)
		return 0, err
	}
	if c.left == 0 {
		return 0, io.EOF
	}
	n, err := c.ReadCloser.Read(p[:min(int64(len(p)), c.left)])
	c.left -= int64(n)
	return n, err
}
