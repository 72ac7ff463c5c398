package sha256s

import (
	"crypto/sha256"

	"github.com/klauspost/cpuid/v2"
)

func init() {
	if cpuid.CPU.Supports(cpuid.SHA, cpuid.AVX, cpuid.SSSE3, cpuid.SSE4) {
		ways = append(ways, way{byInstructions, sha256.BlockSize, 2})
	}
	if cpuid.CPU.Supports(cpuid.AVX512F, cpuid.AVX512VL) {
		ways = append(ways, way{byLanes, 4 * sha256.BlockSize, 1})
	}
}

// byInstructions is for CPUs that have instructions for SHA-256.
func byInstructions(p []byte, states ...*words) {
	n := len(p) / sha256.BlockSize
	switch s := states; len(s) {
	case 2:
		blocks2(&s[0].state, &s[1].state, &p[0], n)
	case 3:
		blocks3(&s[0].state, &s[1].state, &s[2].state, &p[0], n)
	}
}

// byLanes is for those of Intel's that have AVX-512 and not these: Skylake to Cooper Lake.
func byLanes(p []byte, states ...*words) {
	var all [8][4]uint32
	for lane, s := range states {
		for i, v := range s.state {
			all[i][lane] = v
		}
	}
	lanes(&all, &p[0], len(p)/(4*sha256.BlockSize))
	for lane, s := range states {
		for i := range s.state {
			s.state[i] = all[i][lane]
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

// lanes has four states, of which [i][j] is word i of state j, go over n times four blocks, at least one time.
//
//go:noescape
func lanes(states *[8][4]uint32, p *byte, n int)
