// Package source resolves base images for builds and decides, layer by layer,
// whether they are mounted lazily or pulled.
//
// A [Source] wraps BuildKit's own docker-image or oci-layout source: resolving,
// credentials, mirrors and cache keys are BuildKit's. What it adds is a plan for
// every image it resolves: which layers carry a table of contents, and for the
// others the reason why they can't be lazy. The plan travels as a label with the
// layers' snapshots.
//
// The [Snapshotter] stands between BuildKit's cache manager and the worker's
// snapshotter and carries the plan out when the first step needs the image:
// lazy layers are mounted, the others are pulled, and a layer above a pulled one
// is lazy all the same (BuildKit by itself pulls everything from the first such
// layer on). What it does and what was fetched shows in the progress of the FROM
// step.
//
// Results of imported caches get plans too: lazy are the layers of images that the build is FROM, and those of caches in registries. Who sends
// lazy layers elsewhere reads them by [Snapshotter.Stream], verified as a whole.
//
// A lazy layer that can't be opened is pulled, with its reason. The exception is
// a layer whose table of contents isn't the one its manifest promises: that fails
// the build.
package source
