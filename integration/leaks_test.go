package integration

import (
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// keptByBuildKit is how many bytes of heap, and of disk for its history, BuildKit v0.33.1 itself keeps of each build, minutes
// after it. From 30 of these builds to 230, stock buildkitd on overlayfs went from 13.8 MB of heap to 44.1 MB, and from 3.3 MB of
// disk to 30.4 MB. Ours must not add to it.
const keptByBuildKit = 160 << 10

// held is what a daemon, with its children, holds.
type held struct {
	Processes, Descriptors, Goroutines, Mounts int
	Heap, RSS, Disk                            int64 // bytes
}

// holds measures a daemon that serves its debug address.
func holds(t *testing.T, d *daemon.Daemon, debug string) held {
	t.Helper()
	var h held
	for _, pid := range append([]string{strconv.Itoa(d.Pid())}, children(t, d.Pid())...) {
		fds, err := os.ReadDir("/proc/" + pid + "/fd")
		if err != nil {
			continue // it has ended
		}
		h.Processes++
		h.Descriptors += len(fds)
	}
	mounts, err := d.Mounts()
	if err != nil {
		t.Fatal(err)
	}
	h.Mounts = len(mounts)
	for stack := range strings.SplitSeq(get(t, "http://"+debug+"/debug/pprof/goroutine?debug=1"), "\n\n") {
		// BuildKit keeps a build for ten seconds after its end, by goroutines that sleep.
		if !strings.Contains(stack, "moby/buildkit/solver") {
			h.Goroutines += int(number(t, `(?m)^(\d+) @`, stack))
		}
	}
	h.Heap = number(t, `# HeapAlloc = (\d+)`, get(t, "http://"+debug+"/debug/pprof/heap?gc=1&debug=1"))
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", d.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.ParseInt(strings.Fields(string(status))[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	h.RSS = pages * int64(os.Getpagesize())
	err = filepath.WalkDir(d.Root, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return nil //nolint:nilerr // a file that has just gone takes nothing
		}
		if info, err := e.Info(); err == nil {
			h.Disk += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func children(t *testing.T, pid int) []string {
	t.Helper()
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, list := range lists {
		if b, err := os.ReadFile(list); err == nil { // else the thread has ended
			out = append(out, strings.Fields(string(b))...)
		}
	}
	return out
}

func get(t *testing.T, url string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// number returns the number that a pattern has in text, or 0.
func number(t *testing.T, pattern, text string) int64 {
	t.Helper()
	m := regexp.MustCompile(pattern).FindStringSubmatch(text)
	if m == nil {
		return 0
	}
	n, err := strconv.ParseInt(m[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestColdBuildsLeaveNothingBehind builds on one image after the other, prunes after each, and looks at what the daemon still holds.
func TestColdBuildsLeaveNothingBehind(t *testing.T) {
	eachDoorAtOnce(t, func(t *testing.T, door []string) {
		reg := startRegistry(t, registry.Options{})
		debug := freePort(t)
		d := startDaemon(t, daemon.Options{Config: plainHTTP(reg), Env: door, Args: []string{"--debugaddr", debug}})
		im := busybox(t)
		cold := func(i int) {
			content := noise(uint64(1_000_000+i), 256<<10)
			im := im
			im.Layers = append(im.Layers[:1:1], layer(t, fmt.Sprintf("cold%d", i), baseimage.File("f", content)))
			tag := fmt.Sprintf("cold:%d", i)
			push(t, reg, tag, im, baseimage.EStargz)
			res := build(t, d, client.Solve{Dockerfile: "FROM " + reg.Ref(tag) + "\nRUN sha256sum /f > /sum && cat /sum\n"})
			wantContains(t, "output", res.Output(), digest.FromString(content).Encoded())
			if rep := reportOf(t, res); rep.Images[0].Lazy != 2 {
				t.Fatalf("%d layers are lazy, want 2", rep.Images[0].Lazy)
			}
			if _, err := (client.Buildctl{Addr: d.Addr}).Run(t.Context(), "prune", "--all"); err != nil {
				t.Fatal(err)
			}
		}
		// What is made once, such as pools and connections that are kept, is there after some builds.
		warm, builds := thorough(4, 30), thorough(10, 200)
		for i := range warm {
			cold(i)
		}
		before := holds(t, d, debug)
		if before.Goroutines == 0 || before.Heap == 0 {
			t.Fatalf("the debug address tells nothing: %+v", before)
		}
		for i := range builds {
			cold(warm + i)
		}
		limit := held{
			Processes: before.Processes, Mounts: before.Mounts,
			// Connections come and go.
			Descriptors: before.Descriptors + 9, Goroutines: before.Goroutines + 9,
			Heap: before.Heap + 4<<20 + int64(builds)*keptByBuildKit,
			RSS:  before.RSS + 48<<20 + 2*int64(builds)*keptByBuildKit,
			Disk: before.Disk + 4<<20 + int64(builds)*keptByBuildKit,
		}
		var after held
		over := func() []string {
			after = holds(t, d, debug)
			var what []string
			for name, v := range map[string][2]int64{
				"processes": {int64(after.Processes), int64(limit.Processes)}, "descriptors": {int64(after.Descriptors), int64(limit.Descriptors)},
				"goroutines": {int64(after.Goroutines), int64(limit.Goroutines)}, "mounts": {int64(after.Mounts), int64(limit.Mounts)},
				"bytes of heap": {after.Heap, limit.Heap}, "bytes resident": {after.RSS, limit.RSS}, "bytes on disk": {after.Disk, limit.Disk},
			} {
				if v[0] > v[1] {
					what = append(what, fmt.Sprintf("%d %s, want at most %d", v[0], name, v[1]))
				}
			}
			return what
		}
		left := over()
		// BuildKit keeps the traces of builds for two minutes.
		for deadline := time.Now().Add(time.Duration(thorough(60, 240)) * time.Second); len(left) > 0 && time.Now().Before(deadline); {
			time.Sleep(time.Second)
			left = over()
		}
		t.Logf("after %d cold builds %+v\nafter %d more      %+v", warm, before, builds, after)
		if len(left) > 0 {
			t.Errorf("%d cold builds left behind: %s", builds, strings.Join(left, "; "))
		}
	})
}
