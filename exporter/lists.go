package exporter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"
	"time"

	"github.com/containerd/continuity/fs"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/filesync"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/tonistiigi/fsutil"
	fstypes "github.com/tonistiigi/fsutil/types"
	"google.golang.org/grpc/codes"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/order"
)

// Lists reads lists of files from the clients of builds, out of what these offer for COPY.
type Lists struct {
	Sessions *session.Manager
	// Dir is where the tars of layers are kept while they are put in order, in files that have no names. There must be room for those of an
	// image's largest layers, decompressed.
	Dir string
}

// contexts are where a list is looked for that doesn't say in which.
var contexts = []string{"context", "dockerfile"}

// clientTimeout is how long a client may take to appear, as for BuildKit's exporters.
const clientTimeout = 5 * time.Second

// splitList splits the value of an attribute into the names of contexts to look in, and a path.
func splitList(value string) (in []string, name string, err error) {
	in, name = contexts, value
	if from, rest, ok := strings.Cut(value, ":"); ok {
		in, name = []string{from}, rest
	}
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	if name == "" || in[0] == "" {
		return nil, "", fmt.Errorf("%s=%q names no file: give its path in the build context, or CONTEXT:PATH", keyPrioritize, value)
	}
	return in, name, nil
}

// read reads the list that an attribute names.
func (l *Lists) read(ctx context.Context, g session.Group, value string) (*ordering, error) {
	in, name, err := splitList(value)
	if err != nil {
		return nil, err
	}
	where := "the build context"
	if len(in) == 1 {
		where = "context " + in[0]
	}
	waiting, cancel := context.WithTimeoutCause(ctx, clientTimeout, errors.New("the client isn't there"))
	defer cancel()
	var caller session.Caller
	if err := l.Sessions.Any(waiting, g, func(_ context.Context, _ string, c session.Caller) error {
		caller = c
		return nil
	}); err != nil {
		return nil, fmt.Errorf("%s=%s: %w", keyPrioritize, value, err)
	}
	missing := 0
	for _, from := range in {
		list, err := l.fetch(ctx, caller, from, name)
		switch {
		case errors.Is(err, os.ErrNotExist):
			continue
		case grpcerrors.Code(err) == codes.NotFound: // the context, not the file
			missing++
			continue
		case err != nil:
			return nil, fmt.Errorf("%s=%s: read it from %s: %w", keyPrioritize, value, where, err)
		}
		parsed, err := order.Parse(list)
		if err != nil {
			return nil, fmt.Errorf("%s=%s: %w", keyPrioritize, value, err)
		}
		return &ordering{name: value, list: parsed, dir: l.Dir}, nil
	}
	if missing == len(in) {
		return nil, fmt.Errorf("%s=%s: the client offers no local %s: for a remote one, give a local directory a name, with --build-context NAME=DIR, and write %s=NAME:PATH", keyPrioritize, value, strings.TrimPrefix(where, "the "), keyPrioritize)
	}
	return nil, fmt.Errorf("%s=%s: there is no such file in %s", keyPrioritize, value, where)
}

// fetch fetches a file from one of the client's contexts.
func (l *Lists) fetch(ctx context.Context, caller session.Caller, from, name string) ([]byte, error) {
	dir, err := os.MkdirTemp(l.Dir, "list-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	var tooLarge error
	if err := filesync.FSSync(ctx, caller, filesync.FSSendRequestOpt{
		Name:        from,
		FollowPaths: []string{name},
		DestDir:     dir,
		Differ:      fsutil.DiffNone,
		Filter: func(p string, st *fstypes.Stat) bool {
			st.Uid, st.Gid, st.Xattrs = uint32(os.Getuid()), uint32(os.Getgid()), nil
			if st.Size > order.MaxSize && os.FileMode(st.Mode).IsRegular() {
				tooLarge = fmt.Errorf("%s has %d bytes, a list may have %d", p, st.Size, order.MaxSize)
				return false
			}
			return true
		},
	}); err != nil {
		return nil, err
	}
	if tooLarge != nil {
		return nil, tooLarge
	}
	// Links lead nowhere but to what the client has sent.
	at, err := fs.RootPath(dir, name)
	if err != nil {
		return nil, err
	}
	if st, err := os.Stat(at); err == nil && st.IsDir() {
		return nil, errors.New("it is a directory; name a file")
	}
	return os.ReadFile(at)
}
