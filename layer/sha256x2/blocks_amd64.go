package sha256x2

import "github.com/klauspost/cpuid/v2"

func init() {
	if cpuid.CPU.Supports(cpuid.SHA, cpuid.AVX, cpuid.SSSE3, cpuid.SSE4) {
		blocks = func(a, b *[8]uint32, p []byte) {
			if len(p) > 0 {
				blocksSHANI(a, b, &p[0], len(p)/64)
			}
		}
	}
}

// blocksSHANI has both states go over n blocks, at least one, with Intel's SHA extensions.
//
//go:noescape
func blocksSHANI(a, b *[8]uint32, p *byte, n int)
