package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/continuity/sysx"
	"golang.org/x/sys/unix"
)

// lowerDirs returns the directories of the layers of a snapshot, topmost first.
func lowerDirs(ctx context.Context, s snapshots.Snapshotter, key, parent string) (dirs []string, err error) {
	if parent == "" {
		return nil, nil
	}
	view := key + "-lower"
	mounts, err := s.View(ctx, view, parent)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.Remove(context.WithoutCancel(ctx), view)) }()
	return dirsOf(mounts), nil
}

func dirsOf(mounts []mount.Mount) []string {
	if len(mounts) != 1 {
		return nil
	}
	for _, o := range mounts[0].Options {
		if list, ok := strings.CutPrefix(o, lowerOption); ok {
			return strings.Split(list, ":")
		}
	}
	return []string{mounts[0].Source}
}

// once leaves out of mounts what shows a layer a second time, as an image has it that was built with several empty layers, say. Each of
// its snapshots has a bind mount of one directory, and overlayfs refuses to have that twice. What is lower is what goes: whatever it has, and
// hides, the same layer above it has and hides too.
func (e *engine) once(mounts []mount.Mount) []mount.Mount {
	if len(mounts) != 1 || mounts[0].Type != "overlay" {
		return mounts
	}
	m := mounts[0]
	at := slices.IndexFunc(m.Options, func(o string) bool { return strings.HasPrefix(o, lowerOption) })
	if at < 0 {
		return mounts
	}
	dirs := strings.Split(strings.TrimPrefix(m.Options[at], lowerOption), ":")
	var kept []string
	seen := map[*served]bool{}
	e.mu.Lock()
	for _, dir := range dirs {
		if s := e.mounts[dir]; s != nil {
			if seen[s] {
				continue
			}
			seen[s] = true
		}
		kept = append(kept, dir)
	}
	e.mu.Unlock()
	switch {
	case len(kept) == len(dirs):
		return mounts
	case len(kept) == 1 && !slices.ContainsFunc(m.Options, func(o string) bool { return strings.HasPrefix(o, "upperdir=") }):
		// A view of one layer, which is no overlay.
		return []mount.Mount{{Type: "bind", Source: kept[0], Options: []string{"ro", "rbind"}}}
	}
	m.Options = slices.Clone(m.Options)
	m.Options[at] = lowerOption + strings.Join(kept, ":")
	return []mount.Mount{m}
}

// lowerOption is in front of the layers of an overlay, topmost first.
const lowerOption = "lowerdir="

// checkImplied refuses a layer which would change a directory of the layers below
// that it says nothing of: the one made up for it belongs to root, has the mode
// 0755 and no extended attributes.
func checkImplied(implied, lower []string) error {
	for _, dir := range implied {
		for _, l := range lower {
			var st unix.Stat_t
			err := unix.Lstat(filepath.Join(l, dir), &st)
			if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
				continue // made up as unpacking would make it, or further below
			}
			if err != nil {
				return fmt.Errorf("look at the directory %s of the layers below: %w", dir, err)
			}
			xattrs, err := sysx.LListxattr(filepath.Join(l, dir))
			if err != nil && !errors.Is(err, unix.ENOTSUP) {
				return fmt.Errorf("look at the directory %s of the layers below: %w", dir, err)
			}
			if err := checkHidden(dir, st.Mode, st.Uid, st.Gid, xattrs); err != nil {
				return err
			}
			break
		}
	}
	return nil
}

// checkHidden returns an error if what a layer below has at dir is a directory other than the one that is made up for it.
func checkHidden(dir string, mode, uid, gid uint32, xattrs []string) error {
	if mode&unix.S_IFMT != unix.S_IFDIR {
		return nil
	}
	if mode&0o7777 != 0o755 || uid != 0 || gid != 0 {
		return fmt.Errorf("it has no entry for the directory %s, whose mode %04o and owner %d:%d below it would hide", dir, mode&0o7777, uid, gid)
	}
	for _, name := range xattrs {
		// Of the host, and what unpacking doesn't copy either.
		if name != "security.selinux" && !strings.HasPrefix(name, "trusted.") {
			return fmt.Errorf("it has no entry for the directory %s, whose extended attribute %q below it would hide", dir, name)
		}
	}
	return nil
}
