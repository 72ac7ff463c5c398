package deflate

import "testing"

// The symbols of RFC 1951, 3.2.5: two for each power of two, from which on offsets count, and so many extra bits.
func TestOffsetSymbol(t *testing.T) {
	next := 0
	for symbol := range uint(usedOffset) {
		bits := uint(rfc.offsetExtra[symbol])
		for i := range 1 << bits {
			got, extra := offsetSymbol(uint16(next))
			if got != symbol || extra != bits || next&(1<<bits-1) != i {
				t.Fatalf("offset %d: symbol %d with %d extra bits, %d in them; want %d, %d, %d", next+1, got, extra, next&(1<<bits-1), symbol, bits, i)
			}
			next++
		}
	}
	if next != window {
		t.Errorf("offsets up to %d, want %d", next, window)
	}
}
