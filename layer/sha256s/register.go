package sha256s

import (
	"crypto"
	"crypto/fips140"
	"crypto/sha256"
	"encoding"
	"hash"
)

// Register has every digest that a program makes by crypto.SHA256 be written to by [Write], where that is faster for one by itself. So go-digest's are, and with
// them those of content stores and of layers' differs: it leaves it to programs to choose an implementation,
// https://github.com/opencontainers/go-digest/blob/v1.0.0/algorithm.go#L127. crypto/tls makes some, too: who asks for FIPS 140 gets crypto/sha256. Call it
// before anything else runs.
func Register() {
	if !singles() {
		return
	}
	if _, ok := sha256.New().(complete); ok {
		crypto.RegisterHash(crypto.SHA256, newSingle)
	}
}

// singles reports whether a digest by itself is faster than crypto/sha256's, and may be another one.
func singles() bool { return len(ways) > 0 && ways[0].least == 1 && !fips140.Enabled() }

// A complete digest can do what crypto/sha256's can, which crypto/tls asks for.
type complete interface {
	hash.Cloner
	encoding.BinaryMarshaler
	encoding.BinaryAppender
	encoding.BinaryUnmarshaler
}

// A single digest is crypto/sha256's, and is written to by Write.
type single struct{ complete }

func newSingle() hash.Hash { return single{sha256.New().(complete)} }

// Write implements io.Writer.
func (s single) Write(p []byte) (int, error) {
	Write(p, s.complete)
	return len(p), nil
}

// Clone implements hash.Cloner.
func (s single) Clone() (hash.Cloner, error) {
	c, err := s.complete.Clone()
	if err != nil {
		return nil, err
	}
	return single{c.(complete)}, nil
}
