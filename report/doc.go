// Package report keeps account of what builds read of their base images.
//
// The source tells a [Reporter] which images a build uses and what became of
// their layers; whoever fetches bytes tells it how many. When the build ends,
// [Reporter.End] puts both together and the daemon hands it to the client as
// exporter response "lazy.report", which buildx and buildctl write to
// --metadata-file.
//
// It also tells those whom it concerns while a build runs: a read that waits for long is shown in the progress of the
// step that has its layer ([Reporter.Waiting]), and reads become spans of that step ([Reporter.Missed]). A step that
// fails is told which of its layers could not be read ([Reporter.Denied]).
//
// Bytes are counted per layer, not per build: two builds that read the same
// layer at the same time both see its bytes. All methods are safe for
// concurrent use.
package report
