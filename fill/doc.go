// Package fill decides what of a blob to fetch next.
//
// A [Scheduler] does it for all layers of a daemon, which share one link and the processors. A [Filler] belongs to one
// layer: [Filler.Fill] returns when a range of the layer's data space is in its [Sink], and whoever wants to read it,
// kernel or FUSE, waits there. It guarantees that
//
//   - a frame is fetched, decompressed and verified once, whoever asks for it and how often; the caller may leave,
//     the frame arrives all the same;
//   - no chunk gets into the sink that hasn't the digest that the layer states: a sink takes a [layer.Verified], which
//     nothing but that comparison makes, and compares nothing itself. What arrives corrupt is fetched
//     once more, then it's a [CorruptError]. No error is kept: who asks again gets another try;
//   - what somebody waits for goes first: before what is read ahead, that before what a profile names, that before
//     what nobody asked for. The less urgent something is, the fewer bytes of it are outstanding, so that a
//     read finds the link free within about a round trip; background work stops for it at once.
//
// From a read to its requests it's four steps. Fill finds the chunks missing and calls ask, which makes flights of their
// frames (filler.go). Each frame asked for the first time tells something about the next ones: touch follows
// the places that are being read from front to back, and makes flights of what comes there (widen.go). Dispatch
// sends requests while there is room, neighbours in one (scheduler.go). A request hands its frames on as they
// arrive, and they land decoded, verified and written (request.go, decode.go).
//
// What another chunk has the bytes of, in whatever layer of the Scheduler, those included that are only open for that ([Source]), is copied and not
// fetched, where the layers are packed (elsewhere.go).
//
// How far a read is widened depends on evidence: the rest of a small file, its neighbours in the directory, then twice and four
// times what was read in one place, up to a few times what the link carries in a round trip, which is measured
// (estimate.go). What was fetched and isn't used is bounded by what was guessed right, a sixteenth of what was asked for and a few
// round trips' worth, whatever the pattern (afford in widen.go). When most of a layer has been asked for, all of it is fetched. While
// somebody reads an image from one end to the other, what comes next is fetched in the order in which directories of the image are listed
// (walk.go), by as much as was read so and as that was right (stream.go).
// Of a registry that sends the whole blob for each request nothing is asked for that nobody waits for (whole.go).
//
// What a program needs needn't be guessed: the file says it. When its beginning has been read, its loader and libraries are asked
// for, and theirs, in all layers that [Scheduler.Join] has said to be of one image (needs.go, elf.go), and so are the programs that a
// driver runs (runs.go). Who runs a command can say which before it begins, [Filler.Expect], and what it's called with, which says what a
// compiler's driver will run and link (compilers.go), and a linker script what it stands for. So do Python modules with those that they import: python.go, pyc.go.
//
// Less certain is what a file mentions: a header the others that it includes, a module those that it imports, a program the names of
// its data. Words of what was read that are names of files close by are taken for those (mentions.go, names.go); what headers include
// is followed from one to the next (includes.go).
//
// Content steers only what is fetched, and no further than guesses do: it has been verified, and is trusted no more for it.
//
// Goroutines belong to the Scheduler or the Filler whose work they do: its Close cancels and waits for
// them. All methods are safe for concurrent use.
package fill
