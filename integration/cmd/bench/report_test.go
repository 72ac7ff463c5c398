package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/link"
)

func sampleReport(t *testing.T) *report {
	t.Helper()
	rep := &report{
		Started: time.Date(2026, 11, 21, 3, 4, 5, 0, time.UTC), Machine: machine{Kernel: "6.18.0", CPUs: 2}, Runs: 3,
		Versions: map[string]string{"github.com/moby/buildkit": "v0.33.1"},
		Bases: []base{{Name: "debian", Facts: baseimage.Facts{Layers: 6, Files: 31600, Unpacked: 1.7e9},
			Bytes: map[baseimage.Format]int64{baseimage.EStargz: 620e6, baseimage.Zstd: 559e6}}},
	}
	const over = "200 Mbit/s, 20ms"
	g := rep.group(over, "debian", "c", "")
	a, b := cold(2, 31e6), cold(4, 31e6)
	a.Load, b.Load = 0.5, 2.25
	g.row(who(t, "ours"), 620e6).Samples = []sample{a, b, cold(3, 32e6)}
	g.shape = link.Shape{Mbit: 200, Delay: 20 * time.Millisecond}
	g.row(who(t, "overlayfs-zstd"), 559e6).Samples = []sample{cold(48, 559e6), {Error: "not done after 10m0s"}}
	g.row(who(t, "overlayfs-zstd"), 559e6).Local = []sample{cold(0.5, 1e3), {Error: "no space left on device"}}
	g.row(who(t, "stargz-tuned"), 620e6).Samples = []sample{cold(6, 62e6)}
	g.summarize()
	g = rep.group(over, "debian", "c", restart)
	g.row(who(t, "ours"), 620e6).Samples = []sample{{Total: 0.25}}
	g.row(who(t, "stargz-tuned"), 620e6).Samples = []sample{{Error: "failed to mount\nand so on"}}
	g.summarize()
	return rep
}

func TestTable(t *testing.T) {
	var got bytes.Buffer
	if err := sampleReport(t).table(&got); err != nil {
		t.Fatal(err)
	}
	golden := filepath.Join("testdata", "table.txt")
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(golden, got.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != string(want) {
		t.Errorf("UPDATE_GOLDEN=1 takes it over if it is right:\n%s\nwant\n%s", got.String(), want)
	}
}

// TestJSONHoldsWhatTheTableShows makes the table from the file.
func TestJSONHoldsWhatTheTableShows(t *testing.T) {
	rep := sampleReport(t)
	path := filepath.Join(t.TempDir(), "bench.json")
	for range 2 { // a second time over the first
		if err := rep.save(path); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var read report
	if err := json.Unmarshal(raw, &read); err != nil {
		t.Fatal(err)
	}
	var want, got bytes.Buffer
	if err := rep.table(&want); err != nil {
		t.Fatal(err)
	}
	if err := read.table(&got); err != nil {
		t.Fatal(err)
	}
	if got.String() != want.String() {
		t.Errorf("from the file:\n%s\nwant\n%s", got.String(), want.String())
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".bench-*")); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}
