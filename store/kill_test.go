package store

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"
)

const childEnv = "STORE_TEST_CHILD"

// TestMain lets the test binary be the process that is killed.
func TestMain(m *testing.M) {
	if root := os.Getenv(childEnv); root != "" {
		if err := child(root); err != nil {
			os.Stdout.WriteString(err.Error() + "\n")
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func killFixture() *fixture {
	sizes := []int64{8 << 20}
	for i := range int64(300) {
		sizes = append(sizes, 1+i*37)
	}
	return newFixture("killed", newRand(1), 64<<10, sizes...)
}

// child fills a layer, in a random order, and says which chunks are written.
func child(root string) error {
	s, err := Open(root, Options{Quiet: 3 * time.Millisecond})
	if err != nil {
		return err
	}
	fx := killFixture()
	l, err := s.Create(fx.key, bytes.NewReader(fx.toc))
	if err != nil {
		return err
	}
	if _, err := l.Bind(fx.model); err != nil {
		return err
	}
	os.Stdout.WriteString("open\n")
	// Until the other process has seen that it can't have the root: on a busy machine all is written before.
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return err
	}
	for n, i := range rand.Perm(len(fx.model.Chunks)) {
		if err := l.WriteChunk(fx.verified(i)); err != nil {
			return err
		}
		os.Stdout.WriteString(strconv.Itoa(i) + "\n")
		if n%16 == 0 {
			time.Sleep(time.Duration(rand.IntN(8)) * time.Millisecond)
		}
	}
	return s.Close()
}

// TestKilledAtRandomMoments is a SIGKILL of a process that fills a layer, 50 times, 15 with -short: what it has written is there, and
// right.
func TestKilledAtRandomMoments(t *testing.T) {
	root := t.TempDir()
	fx := killFixture()
	var kept, doubtful, trusted, clean int
	kills := 50
	if testing.Short() {
		kills = 15
	}
	for range kills {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+root)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		if !lines.Scan() || lines.Text() != "open" {
			t.Fatalf("child: %q", lines.Text())
		}
		if _, err := Open(root, Options{}); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprint("pid ", cmd.Process.Pid)) {
			t.Fatalf("two processes: %v", err)
		}
		if err := in.Close(); err != nil {
			t.Fatal(err)
		}
		timer := time.AfterFunc(time.Duration(rand.IntN(120_000))*time.Microsecond, func() { _ = cmd.Process.Kill() })
		written := map[int]bool{}
		for lines.Scan() {
			i, err := strconv.Atoi(lines.Text())
			if err != nil {
				t.Fatal(lines.Text())
			}
			written[i] = true
		}
		if cmd.Wait() == nil {
			clean++
		}
		timer.Stop()

		s := open(t, root, Options{Quiet: time.Hour})
		l := hold(t, s, fx)
		trusted += checkRight(t, l, fx)
		if toc, err := l.TOC(); err != nil || !bytes.Equal(toc, fx.toc) {
			t.Fatalf("TOC: %v", err)
		}
		for range l.Doubtful() {
			doubtful++
		}
		for i := range written {
			if !l.Verify(i) {
				t.Fatalf("chunk %d is lost", i)
			}
		}
		kept += len(written)
		for i := range fx.model.Chunks {
			l.Verify(i)
		}
		all := checkRight(t, l, fx)
		l.Release()
		if all == len(fx.model.Chunks) || rand.IntN(4) == 0 {
			if err := s.Remove(fx.key); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d chunks were written and kept, %d were trusted and %d in doubt; %d children were done before", kept, trusted, doubtful, clean)
	if kept == 0 || doubtful == 0 || clean > kills*4/5 {
		t.Error("this has tested little")
	}
}
