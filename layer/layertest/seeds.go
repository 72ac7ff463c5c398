package layertest

import "testing"

// Seeds returns how many inputs a test makes at random, of n: all, or a fifth with -short, as under the race detector, where what handles bytes
// one by one takes fifty times as long.
func Seeds(n uint64) uint64 {
	if testing.Short() {
		return n / 5
	}
	return n
}
