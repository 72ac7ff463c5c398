// Package cleanup undoes what outlives a process: network namespaces, mounts,
// child processes.
//
// Whoever creates such a thing registers how to undo it with [Add] and calls
// the returned function when it has been undone in the ordinary way. [Trap] makes
// SIGINT and SIGTERM run what is still registered, newest first, before the
// process exits with status 130; a test binary, whose deferred calls a signal
// would skip, calls it in TestMain. SIGKILL leaves things behind: names made by
// this module carry the pid of their owner so that a person can tell whose
// they were.
package cleanup

import (
	"fmt"
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"time"
)

var (
	mu      sync.Mutex
	order   []*entry
	running int // undos that have begun and not ended
	ended   = sync.NewCond(&mu)
)

// entry is something that is registered.
type entry struct {
	undo  func()
	begun bool          // guarded by mu
	done  chan struct{} // closed when undo has ended
}

// Add registers undo and returns a function that runs it, once, and forgets
// it. If somebody else runs it already, that waits for its end: what was registered before may rely on it. Both are safe for concurrent use.
func Add(undo func()) (run func()) {
	mu.Lock()
	defer mu.Unlock()
	e := &entry{undo: undo, done: make(chan struct{})}
	order = append(order, e)
	return e.run
}

// TempDir makes a directory for everything temporary of this process and those that it starts, and
// names it in TMPDIR. name is the process's. Called before anything else registers what is undone, its removal is
// the last thing that [All] does: nothing is mounted below it any more.
func TempDir(name string) (dir string, remove func(), err error) {
	if dir, err = os.MkdirTemp("", "lazy-"+name+"-"); err != nil {
		return "", nil, err
	}
	remove = Add(func() {
		// What a daemon that was interrupted while it started had mounted may stay for a moment after its end.
		err := os.RemoveAll(dir)
		for range 30 {
			if err == nil {
				return
			}
			time.Sleep(100 * time.Millisecond)
			err = os.RemoveAll(dir)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, name+":", err)
		}
	})
	if err := os.Setenv("TMPDIR", dir); err != nil {
		remove()
		return "", nil, err
	}
	return dir, remove, nil
}

// All runs everything that is registered, newest first. It waits for what others are
// undoing meanwhile: the process may exit when All returns.
func All() {
	for {
		mu.Lock()
		for running > 0 {
			ended.Wait()
		}
		if len(order) == 0 {
			mu.Unlock()
			return
		}
		e := order[len(order)-1]
		mu.Unlock()
		e.run()
	}
}

func (e *entry) run() {
	mu.Lock()
	if e.begun {
		mu.Unlock()
		<-e.done
		return
	}
	e.begun = true
	order = slices.DeleteFunc(order, func(o *entry) bool { return o == e })
	running++
	mu.Unlock()
	defer func() {
		close(e.done)
		mu.Lock()
		running--
		mu.Unlock()
		ended.Broadcast()
	}()
	e.undo()
}

// Trap runs [All] on SIGINT or SIGTERM and exits with status 130. The
// returned function ends the trap.
func Trap() (stop func()) {
	ch := make(chan os.Signal, 1)
	done := make(chan struct{})
	signal.Notify(ch, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		select {
		case <-ch:
			All()
			os.Exit(130)
		case <-done:
		}
	}()
	return sync.OnceFunc(func() {
		signal.Stop(ch)
		close(done)
	})
}
