package snapshot

import (
	"math"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSpare(t *testing.T) {
	for _, tc := range []struct {
		name                string
		blocks, free, avail uint64
		want                int64 // blocks left to builds
	}{
		{"empty", 1000, 1000, 1000, 100},
		{"full", 1000, 0, 0, 100},
		{"half is held back", 1000, 700, 200, 50},
		{"half is held back, nothing else is free", 1000, 500, 0, 50},
	} {
		t.Run(tc.name, func(t *testing.T) {
			free, left := spare(&unix.Statfs_t{Bsize: 4096, Blocks: tc.blocks, Bfree: tc.free, Bavail: tc.avail})
			if free != int64(tc.avail)*4096 || left != tc.want*4096 {
				t.Errorf("%d bytes free, %d left; want %d, %d", free, left, tc.avail*4096, tc.want*4096)
			}
		})
	}
}

func TestRoom(t *testing.T) {
	for _, tc := range []struct {
		name, dir string
		bytes     int64
		want      bool
	}{
		{"more than any disk has", t.TempDir(), math.MaxInt64, false},
		{"less than nothing", t.TempDir(), math.MinInt64 / 2, true},
		{"a disk that can't be asked", t.TempDir() + "/gone", 0, false},
	} {
		told := 0
		ask := room(tc.dir, func(error) { told++ })
		for range 3 {
			if has := ask(tc.bytes); has != tc.want {
				t.Errorf("%s: %t", tc.name, has)
			}
		}
		if (told == 1) == tc.want {
			t.Errorf("%s: told %d times", tc.name, told)
		}
	}
}
