// Package exporter makes BuildKit's exporters write lazily pullable layers.
//
// With compression=estargz BuildKit writes eStargz layers whose descriptors carry
// the digest of their table of contents and their uncompressed size, in a pushed
// manifest, an OCI or docker tar, and the content store alike. What this package
// adds is that attributes are checked before a build spends its time: those which
// make no sense together, or that no exporter knows, are errors which say so.
package exporter
