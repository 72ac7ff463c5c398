package sha256s

import (
	"crypto/sha256"

	"github.com/klauspost/cpuid/v2"
)

func init() {
	if cpuid.CPU.Supports(cpuid.SHA, cpuid.AVX, cpuid.SSSE3, cpuid.SSE4) {
		blocks = func(p []byte, states ...*words) {
			n := len(p) / sha256.BlockSize
			switch s := states; len(s) {
			case 2:
				blocks2(&s[0].state, &s[1].state, &p[0], n)
			case 3:
				blocks3(&s[0].state, &s[1].state, &s[2].state, &p[0], n)
			}
		}
	}
}

// blocks2 has both states go over n blocks, at least one.
//
//go:noescape
func blocks2(a, b *[8]uint32, p *byte, n int)

// blocks3 has three states go over n blocks, at least one.
//
//go:noescape
func blocks3(a, b, c *[8]uint32, p *byte, n int)
