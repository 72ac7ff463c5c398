// Package exporter makes BuildKit's exporters write lazily pullable layers.
//
// With compression=estargz new layers are written by package estargz, on all CPUs, and their descriptors carry
// the digest of their table of contents and their uncompressed size: in a pushed
// manifest, an OCI or docker tar, the content store, and exported caches alike. BuildKit takes a compression for an
// interface, so this one stands in for BuildKit's own, and nothing else of the exporters is replaced: [New] wraps one, and the refs
// that it exports; [Cache] wraps one of caches. A layer that is eStargz already is taken as it is.
//
// With compression=zstdchunked the same is done by package zstdchunked, in the place of BuildKit's zstd, and with Podman's annotations.
//
// A push reads the blobs of lazy layers from where they are, which [Blobs] knows, and keeps nothing of them, and so does the export of a cache, which has them by
// [ToCache]; unless others of the same build want them too. What was converted, or rewritten for SOURCE_DATE_EPOCH, is found again by labels of its blob.
// Lazy layers are converted while they arrive, by [Conversions], whose blobs nobody has: what they become is noted in BuildKit's records of them.
//
// With lazy-prioritize, the files of the layers are put in the order of a list, which [Lists] reads from the client. Labels in the content store say by
// which options a blob was written: one that this daemon has made by others is made again, the base image's are not, unless
// compression is forced; see [GetRemotes].
//
// With estargz-external-toc, the tables of contents are blobs of their own in the content store, which live as long as the layers. They are pushed,
// as an image by itself, before the image whose layers they describe.
//
// All exports of a daemon share one pool of CPUs and memory. One that fails, or is cancelled, says why, leaves no goroutine behind, and
// nothing in the content store that anything refers to. Where compression is forced, the error names the layer that couldn't be converted, and one
// whose DiffID isn't what its image's configuration says is refused. Without force, a layer that is in the cache in another format stays that, and
// a warning says so, of images and of caches. One that can't have a table of contents is written without, and a warning names the file.
//
// Attributes are checked before a build spends its time: those which
// make no sense together, or that no exporter knows, are errors which say so.
package exporter
