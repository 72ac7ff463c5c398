// Package blob reads registry blobs by byte range.
//
// A [Reader] knows one blob of one repository and the hosts that may serve it,
// in the order in which a pull would try them: mirrors first, the registry
// itself last. [Reader.Fetch] asks for a range and returns a body which carries
// on by itself: when a connection breaks in the middle, the rest is asked for
// again, from the next host if there is one, with growing pauses, until
// [Options.RetryFor] has passed without a byte arriving.
//
// Redirects to object stores are followed and remembered; the Authorization
// header never travels to another host, and a signed URL that stops working is
// asked for again. A host which answers a range request with the whole blob is
// an [ErrNoRange]: such a registry can't serve lazy layers, and if it did until now
// see [Reader.AcceptWhole]. A host that was silent, or next to that, is asked after the others for a while, and
// one that answers with Retry-After for as long as it says; it's waited for only if no other can be asked sooner.
//
// A Reader is safe for concurrent use. It does not verify: whoever knows the
// layer's table of contents does.
package blob
