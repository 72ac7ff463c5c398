package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	cerrdefs "github.com/containerd/errdefs"
)

// SetAside makes way for new snapshots below root, which is of one of containerd's own snapshotters or of stargz-snapshotter's: metadata.db and
// snapshots/ID. They name a snapshot's directory before they commit its ID. After a kill in between the next snapshot gets the same ID, and fails as
// there is such a directory. What isn't in the metadata gets a name that Cleanup finds. It's called before the snapshotter is opened.
func SetAside(ctx context.Context, root string) error {
	dir := filepath.Join(root, "snapshots")
	found, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if len(found) == 0 {
		return nil
	}
	ids, err := committedIDs(ctx, filepath.Join(root, "metadata.db"))
	if err != nil {
		return fmt.Errorf("find snapshots of %s: %w", root, err)
	}
	for _, entry := range found {
		if _, err := strconv.ParseUint(entry.Name(), 10, 64); err != nil {
			continue // temporary itself
		}
		if _, ok := ids[entry.Name()]; ok {
			continue
		}
		aside, err := os.MkdirTemp(dir, "new-") // as what is being made is called
		if err != nil {
			return err
		}
		if err := os.Rename(filepath.Join(dir, entry.Name()), filepath.Join(aside, entry.Name())); err != nil {
			return fmt.Errorf("set the directory of a snapshot aside that was not finished: %w", err)
		}
	}
	return nil
}

// committedIDs returns the snapshots of a database of package storage, by ID.
func committedIDs(ctx context.Context, file string) (ids map[string]string, err error) {
	db, err := storage.NewMetaStore(file)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	err = db.WithTransaction(ctx, false, func(ctx context.Context) error {
		ids, err = storage.IDMap(ctx)
		if cerrdefs.IsNotFound(err) {
			return nil // it has had none yet
		}
		return err
	})
	return ids, err
}
