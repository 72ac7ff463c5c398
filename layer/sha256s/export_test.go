package sha256s

import "slices"

// Ways returns how many ways this CPU has, and that of one after the other.
func Ways() int { return len(ways) + 1 }

// NewSingle is what Register registers.
var NewSingle = newSingle

// Singles reports whether Register does something.
var Singles = singles

// Use has Write take one of them, until restore is called.
func Use(i int) (restore func()) {
	all := ways
	ways = append(slices.Clip(ways), way{})[i : i+1]
	if i == len(all) {
		ways = nil
	}
	return func() { ways = all }
}
