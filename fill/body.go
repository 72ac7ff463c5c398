package fill

import "io"

// SourceOf returns who sends a body, "" if it doesn't say: see [Fetcher].
func SourceOf(body io.Reader) string {
	if src, ok := body.(interface{ Source() string }); ok {
		return src.Source()
	}
	return ""
}

// IsWhole reports whether a body is cut out of a whole blob: see [Fetcher].
func IsWhole(body io.Reader) bool {
	b, ok := body.(interface{ Whole() bool })
	return ok && b.Whole()
}

// isLocal reports whether a body doesn't come over the link: see [Fetcher].
func isLocal(body io.Reader) bool {
	b, ok := body.(interface{ Local() bool })
	return ok && b.Local()
}
