package worker

import (
	"cmp"
	"context"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	bkexecutor "github.com/moby/buildkit/executor"
	"github.com/moby/buildkit/util/bklog"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"
	"github.com/sirupsen/logrus"
	"go.opentelemetry.io/otel/metric"

	"github.com/buildkitd-lazy/buildkitd-lazy/fill"
	"github.com/buildkitd-lazy/buildkitd-lazy/report"
	"github.com/buildkitd-lazy/buildkitd-lazy/snapshot"
)

// watch tells the reporter, the metrics and the log of reads that wait.
func watch(meter metric.Meter, rep *report.Reporter) (snapshot.Watch, error) {
	waits, err := waitHistogram(meter)
	if err != nil {
		return snapshot.Watch{}, err
	}
	return snapshot.Watch{
		NoRoom: func(why error) { bklog.L.WithError(why).Warn("background-fetch waits for room on the disk") },
		Missed: func(layer digest.Digest, m fill.Miss) {
			waits.Record(context.Background(), m.Waited.Seconds())
			rep.Missed(layer, m.Off, m.Bytes, m.Start, m.Waited, m.Err)
		},
		Denied: rep.Denied,
		Slow: func(r snapshot.SlowRead) func() {
			return rep.Waiting(r.Layer, r.Since, func() string {
				why := r.Why()
				bklog.L.WithFields(logrus.Fields{
					"layer": r.Layer, "repository": r.Repository, "file": cmp.Or(r.File, "table of contents"), "since": r.Since.Format(time.RFC3339), "reason": why,
				}).Warn("a read waits for the registry")
				return report.WaitLine(r.Repository, r.Layer, why)
			})
		},
	}, nil
}

// layerAt returns the lazy layer that is mounted at a directory.
type layerAt func(dir string) (digest.Digest, bool)

func (w *Worker) layerAt(dir string) (digest.Digest, bool) {
	if s, ok := w.snapshotter.(*snapshot.Snapshotter); ok {
		return s.LayerAt(dir)
	}
	return "", false
}

// LazyStats say how far lazy layers have come; all is zero if there are none.
func (w *Worker) LazyStats() snapshot.Stats {
	if s, ok := w.snapshotter.(*snapshot.Snapshotter); ok {
		return s.Stats()
	}
	return snapshot.Stats{}
}

// lazySummary is LazyStats without the layers.
func (w *Worker) lazySummary() snapshot.Summary {
	if s, ok := w.snapshotter.(*snapshot.Snapshotter); ok {
		return s.Summary()
	}
	return snapshot.Summary{}
}

// watchMounts has the step told of the layers in what is mounted for it. Rooted is called with the directory of a lazy layer of the root,
// when that is mounted.
func watchMounts(step *report.Step, at layerAt, rooted func(dir string), root bkexecutor.Mount, mounts []bkexecutor.Mount) (bkexecutor.Mount, []bkexecutor.Mount) {
	watch := func(m bkexecutor.Mount, first func(dir string)) bkexecutor.Mount {
		if m.Src != nil && at != nil {
			m.Src = watchedMount{m.Src, step, at, first}
		}
		return m
	}
	watched := make([]bkexecutor.Mount, len(mounts))
	for i, m := range mounts {
		watched[i] = watch(m, func(string) {})
	}
	return watch(root, rooted), watched
}

type watchedMount struct {
	bkexecutor.Mountable
	step  *report.Step
	at    layerAt
	first func(dir string) // called with one of the layers, if there are some
}

// Mount implements executor.Mountable.
func (w watchedMount) Mount(ctx context.Context, readonly bool) (bkexecutor.MountableRef, error) {
	ref, err := w.Mountable.Mount(ctx, readonly)
	if err != nil {
		return nil, err
	}
	return watchedRef{ref, w}, nil
}

type watchedRef struct {
	bkexecutor.MountableRef
	by watchedMount
}

// Mount implements executor.MountableRef.
func (r watchedRef) Mount() ([]mount.Mount, func() error, error) {
	mounts, release, err := r.MountableRef.Mount()
	if err != nil {
		return mounts, release, err
	}
	layers, one := r.by.at.layersIn(mounts, dirsOf)
	if one != "" {
		r.by.first(one)
	}
	return mounts, releasing(release, r.by.step.Mounts(layers)), nil
}

// told returns what tells the reporter which layers are in mounts.
func (at layerAt) told(rep *report.Reporter) func(mounts []mount.Mount) (over func(), err error) {
	return func(mounts []mount.Mount) (func(), error) {
		layers, _ := at.layersIn(mounts, func(m mount.Mount) []string { return append(lowerDirs(m.Options), m.Source) })
		return rep.Mounts(layers), nil
	}
}

// layersIn returns the lazy layers in mounts, each once, and the directory of one of them.
func (at layerAt) layersIn(mounts []mount.Mount, dirsOf func(mount.Mount) []string) (layers []digest.Digest, one string) {
	for _, m := range mounts {
		for _, dir := range dirsOf(m) {
			if layer, ok := at(dir); ok && !slices.Contains(layers, layer) {
				layers, one = append(layers, layer), dir
			}
		}
	}
	return layers, one
}

// dirsOf returns the directories that a mount shows: the layers of an overlay, or what a bind mount is of. BuildKit mounts
// the root of a step by itself and hands on a bind mount of that: what's below is with the kernel.
func dirsOf(m mount.Mount) []string {
	if m.Source == "" || m.Type == "overlay" {
		return lowerDirs(m.Options)
	}
	dirs := []string{m.Source}
	dir, err := filepath.EvalSymlinks(m.Source)
	if err != nil {
		return dirs
	}
	mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(dir))
	if err != nil {
		return dirs
	}
	for _, info := range mounts {
		dirs = append(dirs, lowerDirs(mountOptions(info))...)
	}
	return dirs
}

// mountOptions returns the options of a filesystem as they were given: where they are listed, some characters are in octal, as
// seq_show_option() of Linux's seq_file.h has it.
func mountOptions(m *mountinfo.Info) []string {
	options := strings.Split(m.VFSOptions, ",")
	for i, o := range options {
		options[i] = inOctal.ReplaceAllStringFunc(o, func(s string) string {
			n, err := strconv.ParseUint(s[1:], 8, 8)
			if err != nil {
				return s
			}
			return string([]byte{byte(n)})
		})
	}
	return options
}

var inOctal = regexp.MustCompile(`\\[0-7]{3}`)

// lowerDirs returns the layers that are in an overlay's options.
func lowerDirs(options []string) []string {
	var dirs []string
	for _, o := range options {
		if name, value, _ := strings.Cut(o, "="); name == "lowerdir" || name == "lowerdir+" {
			dirs = append(dirs, strings.Split(value, ":")...)
		}
	}
	return dirs
}
