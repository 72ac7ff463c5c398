package behind

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"
)

// Package mounttest has doors drop what was read. This is about when it's looked for.
func TestDrop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, end := context.WithCancelCause(t.Context())
		start := time.Now()
		var looks []time.Duration
		Drop(ctx, func() bool {
			looks = append(looks, time.Since(start))
			if len(looks) == 4 {
				end(errors.New("over"))
			}
			return len(looks) == 2
		})
		if len(looks) != 4 || looks[0] != Idle || looks[1] != 2*Idle || looks[2] != 2*Idle+Busy || looks[3] != 3*Idle+Busy {
			t.Errorf("looked after %v", looks)
		}
	})
}

func TestOpen(t *testing.T) {
	if f := Open(-1); f != nil || f.Look() {
		t.Error("there is such a file")
	}
	data, err := os.Create(filepath.Join(t.TempDir(), "data"))
	if err != nil {
		t.Fatal(err)
	}
	defer data.Close()
	if err := data.Truncate(3*Block + 1); err != nil {
		t.Fatal(err)
	}
	f := Open(int(data.Fd()))
	if f == nil || len(f.blocks) != 4 || f.Look() {
		t.Errorf("%+v", f)
	}
	f.Close()
	f.Close()
	(*File)(nil).Close()
}
