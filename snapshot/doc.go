// Package snapshot is a containerd snapshotter whose layers need not be there
// when they are mounted.
//
// It behaves like containerd's overlayfs snapshotter. When Prepare is given the
// label "containerd.io/snapshot.ref" and labels that say where a layer's blob is
// ([LabelRef], [LabelDigest]), it tries to mount the layer from its table of
// contents and answers ErrAlreadyExists: the layer is "there", as containerd's
// remote snapshotters define it. When that fails, Prepare makes nothing and returns
// a [MountError], and the caller pulls the layer.
//
// One engine serves all layers. A layer is opened once, from its table of contents or from the store of an earlier use,
// and mounted by a door, package mount/erofs or mount/fuse, in the engine's own directory; a snapshot of it is a bind
// mount. What readers miss, package fill fetches through package blob, and package store keeps. Mounts end with Close;
// what a killed daemon left behind is unmounted by the next New, and snapshots that it hadn't finished making are set aside (interrupted.go).
//
// A layer's blob is read from the repository that a build has named for it last, and where that fails from those that builds before have (repositories.go).
// What a layer is missing and another one has in the store, though nobody uses that, is copied from there (sources.go).
//
// Snapshots outlive the process. New mounts none of them: a layer is mounted again when somebody uses it, which needs no
// network if the store still has it, and its registry else. A layer takes space in the store as long as a snapshot has
// it; Usage counts it, and Cleanup frees it.
//
// Who wants all of a layer as the tar that it was made of, to make another layer of it, has that by Tar, which takes what has arrived from the store.
package snapshot
