package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
)

// A contestant is a daemon and the format in which it gets the base image.
type contestant struct {
	name   string
	kind   daemon.Kind
	format baseimage.Format
}

var contestants = []contestant{
	{"ours", daemon.Ours, baseimage.EStargz},
	{"overlayfs-gzip", daemon.StockOverlay, baseimage.Gzip},
	{"overlayfs-zstd", daemon.StockOverlay, baseimage.Zstd},
	{"stargz", daemon.StockStargz, baseimage.EStargz},
	{"stargz-tuned", daemon.StockStargzTuned, baseimage.EStargz},
}

// fills reports whether the contestant is measured with everything on the local disk. Stock stargz isn't: it takes minutes to fill, and is
// never a local filesystem.
func (c contestant) fills() bool { return c.kind == daemon.Ours || c.kind == daemon.StockOverlay }

func (c contestant) stock() bool { return c.kind != daemon.Ours }

// rotate returns the list begun at its n-th element, so that nobody is always first.
func rotate[T any](list []T, n int) []T {
	if len(list) == 0 {
		return nil
	}
	n %= len(list)
	return slices.Concat(list[n:], list[:n])
}

// choose returns the elements that a comma-separated list names, in the list's order.
func choose[T any](flag, list string, all []T, name func(T) string) ([]T, error) {
	if list == "all" {
		return all, nil
	}
	var chosen []T
	for part := range strings.SplitSeq(list, ",") {
		part = strings.TrimSpace(part)
		i := slices.IndexFunc(all, func(e T) bool { return name(e) == part })
		if i < 0 {
			var names []string
			for _, e := range all {
				names = append(names, name(e))
			}
			return nil, fmt.Errorf("-%s: no %q; there are %s, or all", flag, part, strings.Join(names, ", "))
		}
		chosen = append(chosen, all[i])
	}
	return chosen, nil
}
