// Package order puts the files of a layer first that are read first.
//
// A [List] names them: paths, and globs. [List.Tar] reads the tar of a layer and makes one that has, in this order,
//
//	the entries that the list names, in the list's order, with what they can't do without
//	a landmark, up to which readers of eStargz and zstd:chunked fetch a layer ahead of its use
//	all the others, in the order in which they were
//
// or, if the list names none of them, a landmark that says so and the tar as it was. What unpacks to one unpacks to the other: in front of an
// entry are its parents, their whiteouts and opaque markers, and the target of a hardlink; entries of one name stay together, so that the
// last one still counts. An entry's headers, content and padding are copied byte by byte.
//
// A tar that no reader takes stays as it is, without a landmark: one with an entry for which a table of contents has no place, with a name that no
// filesystem has, or more entries than [layer.MaxEntries]. Its layer is pulled whole, and so it doesn't matter what is first in it.
//
// The landmark says in a record of its header where the moved entries come from. When such a tar is ordered by another list, it is
// put in its first order before. So what comes out depends on the list and on the layer, not on what else it was ordered by.
//
// As the last entry of a tar may be the first of the list, nothing can be written before all is read: the tar is kept in a file without
// a name, as large as the tar, which is gone with the [Tar], or the process. In memory are some 200 bytes for each entry.
//
// The reader of the result gets errors of the tar, and of the disk. A List is safe for concurrent use, a Tar is not.
package order
