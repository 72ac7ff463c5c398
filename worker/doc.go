// Package worker assembles BuildKit's OCI worker from our parts: the lazy
// snapshotter, the image sources that plan for it, and the exporters which write
// lazy layers. Executor, network, cache and garbage collection are BuildKit's own
// and are configured as stock buildkitd configures them.
//
// Where lazy layers can't be had - no FUSE, another snapshotter asked for, mount
// "off" - the worker is stock BuildKit's, and says why once. Close unmounts every
// layer; nothing may use the worker any more by then.
package worker
