// Package fill decides what of a blob to fetch next.
//
// A [Readahead] stands between a reader that asks for one range after another and
// the ranged reads that answer it. A range nobody expected is asked for as it is.
// One which goes on where an earlier one ended is a sequential read: from then on
// the bytes that follow are asked for before their reader comes, in windows that
// double while they are used, so that the link is busy while the reader decodes
// and no round trip is waited for. Several sequential reads of one blob are told
// apart by where they stand. Nothing is asked for that a reader has asked for
// before, since readers keep what they get, nor what is in a window: reads that
// overtake each other or skip some of it are answered from there.
//
// Windows belong to the Readahead: its Close cancels and waits for them. All
// methods are safe for concurrent use.
package fill
