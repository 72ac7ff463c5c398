package convert

import (
	"context"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/order"
)

// orderVersion is another one whenever package order makes something else of the same tar and list.
const orderVersion = 2

// InOrder returns the format with the files first in their layers that a list names. The tars of layers are kept in a directory while they
// are put in order, in files without names; "" is that for temporary files.
func InOrder(f Format, list *order.List, dir string) Format { return ordered{f, list, dir} }

type ordered struct {
	Format
	list *order.List
	dir  string
}

// Key implements Format.
func (o ordered) Key() string {
	return fmt.Sprintf("%s order/%d=%s", o.Format.Key(), orderVersion, o.list.Digest())
}

// Write implements Format.
func (o ordered) Write(ctx context.Context, w io.Writer, tar io.Reader) (Written, error) {
	before := digest.SHA256.Digester()
	t, err := o.list.Tar(ctx, io.TeeReader(tar, before.Hash()), o.dir)
	if err != nil {
		return Written{}, err
	}
	defer t.Close()
	made, err := o.Format.Write(ctx, w, t)
	made.Tar, made.First = before.Digest(), t.First
	return made, err
}
