package cleanup

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// TestAllWaitsForOthers undoes one thing in the ordinary way while a signal's All begins: it must
// not return, as the process exits then, before that is undone, and older things come after it.
func TestAllWaitsForOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var done []string
		Add(func() { done = append(done, "older") })
		run := Add(func() {
			time.Sleep(time.Second)
			done = append(done, "newer")
		})
		go run()
		synctest.Wait()
		All()
		if want := []string{"newer", "older"}; !slices.Equal(done, want) {
			t.Errorf("undone when All returned: %v, want %v", done, want)
		}
	})
}

// TestOthersWaitForAll undoes things in the ordinary way while a signal's All has begun: what's older comes after what All undoes.
func TestOthersWaitForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var done []string
		older := Add(func() { done = append(done, "older") })
		newer := Add(func() {
			time.Sleep(time.Second)
			done = append(done, "newer")
		})
		go All()
		synctest.Wait()
		newer()
		older()
		if want := []string{"newer", "older"}; !slices.Equal(done, want) {
			t.Errorf("undone: %v, want %v", done, want)
		}
		synctest.Wait()
	})
}
