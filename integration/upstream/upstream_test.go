package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
)

// TestMain lets the test binary be process 1 of a sandbox, as the command is.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == sandboxArg {
		status, err := sandboxMain(os.Args[2])
		if err != nil {
			os.Stderr.WriteString(err.Error() + "\n")
			os.Exit(125)
		}
		os.Exit(status)
	}
	os.Exit(m.Run())
}

func TestSplit(t *testing.T) {
	for _, tc := range []struct {
		full, worker   string
		top, name, key string
		ok             bool
	}{
		{"TestIntegration/TestCopy/worker=oci/frontend=builtin", "oci", "TestIntegration", "TestCopy", "TestIntegration/TestCopy/frontend=builtin", true},
		{"TestIntegration/TestCopy/worker=oci", "oci", "TestIntegration", "TestCopy", "TestIntegration/TestCopy", true},
		{"TestIntegration/TestCopy/worker=oci-snapshotter-stargz/part/1", "oci-snapshotter-stargz", "TestIntegration", "TestCopy", "TestIntegration/TestCopy/part/1", true},
		{full: "TestIntegration/TestCopy/worker=oci-snapshotter-stargz", worker: "oci"},
		{full: "TestIntegration/TestCopy/worker=containerd", worker: "oci"},
		{full: "TestIntegration", worker: "oci"},
	} {
		tn, key, ok := split(tc.full, tc.worker)
		if ok != tc.ok || tn != (testName{tc.top, tc.name}) || key != tc.key {
			t.Errorf("split(%s, %s) = %v, %q, %v", tc.full, tc.worker, tn, key, ok)
		}
	}
}

func outcomes(kv ...string) results {
	r := results{Outcomes: map[string]outcome{}}
	for i := 0; i < len(kv); i += 2 {
		r.Outcomes[kv[i]] = outcome{Result: kv[i+1]}
	}
	return r
}

func TestDifferencesAreWhatStockPassesAndOursDoesNot(t *testing.T) {
	stock := outcomes("s: T/A", pass, "s: T/B", pass, "s: T/B/1", pass, "s: T/B/2", pass, "s: T/C", fail, "s: T/D", skip, "s: T/E", pass, "s: T/E/1", pass, "s: T/F", pass)
	ours := outcomes("s: T/A", pass, "s: T/B", fail, "s: T/B/1", fail, "s: T/B/2", pass, "s: T/C", fail, "s: T/D", pass, "s: T/E", lost, "s: T/F", skip)
	c := diff("plain", stock, ours, true)
	var got []string
	for _, d := range c.Differences {
		got = append(got, d.Test+" "+d.Ours)
	}
	want := []string{"s: T/B/1 fail", "s: T/E lost", "s: T/F skip"}
	if !slices.Equal(got, want) {
		t.Errorf("differences %q, want %q", got, want)
	}
	if len(c.NotComparable) != 2 {
		t.Errorf("not comparable: %v, want T/C and T/D", c.NotComparable)
	}
}

func TestASecondTryReplacesTheFirst(t *testing.T) {
	tn := testName{"TestIntegration", "TestCopy"}
	rs := runs{}
	first := `{"Action":"output","Test":"TestIntegration/TestCopy/worker=oci","Output":"broken pipe\n"}
{"Action":"fail","Test":"TestIntegration/TestCopy/worker=oci","Elapsed":1}
{"Action":"pass","Test":"TestIntegration/TestCopyAll/worker=oci","Elapsed":1}
`
	if err := rs.read(strings.NewReader(first)); err != nil {
		t.Fatal(err)
	}
	if rs.ended(tn) {
		t.Fatal("a failed test counts as ended well")
	}
	second := runs{}
	if err := second.read(strings.NewReader(`{"Action":"pass","Test":"TestIntegration/TestCopy/worker=oci","Elapsed":2}`)); err != nil {
		t.Fatal(err)
	}
	rs.replace(tn, second)
	o := rs["TestIntegration/TestCopy/worker=oci"]
	if o.Result != pass || !o.Retried || len(rs) != 2 {
		t.Errorf("after the second try: %+v, %d outcomes", o, len(rs))
	}
	if rs["TestIntegration/TestCopyAll/worker=oci"].Retried {
		t.Error("a test with a longer name was replaced too")
	}
}

func TestExcerptFindsTheAssertionAndTheDaemonsError(t *testing.T) {
	file := filepath.Join(t.TempDir(), "log")
	log := "=== RUN x\n        \tError Trace:\ta.go:1\n        \tError:      \tReceived unexpected error:\n        \t            \tno such thing\n        \tTest:       \tx\n" +
		`    sandbox.go:205: time="now" level=error msg="boom"` + "\n    sandbox.go:205: time=now level=debug msg=quiet\n"
	if err := os.WriteFile(file, []byte(log), 0o600); err != nil {
		t.Fatal(err)
	}
	got := strings.Join(excerpt(file), "\n")
	for _, want := range []string{"no such thing", "boom"} {
		if !strings.Contains(got, want) {
			t.Errorf("excerpt %q lacks %q", got, want)
		}
	}
	if strings.Contains(got, "quiet") {
		t.Errorf("excerpt %q holds a debug line", got)
	}
}

func TestEStargzImagesHaveATableOfContents(t *testing.T) {
	l, err := mirror{estargz: true}.userland("/bin/busybox", false)
	if err != nil {
		t.Fatal(err)
	}
	rc, err := l.Compressed()
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	var b bytes.Buffer
	if _, err := b.ReadFrom(rc); err != nil {
		t.Fatal(err)
	}
	r, err := estargz.Open(io.NewSectionReader(bytes.NewReader(b.Bytes()), 0, int64(b.Len())))
	if err != nil {
		t.Fatal(err)
	}
	if r.TOCDigest().String() != l.annotations[estargz.TOCJSONDigestAnnotation] {
		t.Errorf("TOC digest %s, annotation %s", r.TOCDigest(), l.annotations[estargz.TOCJSONDigestAnnotation])
	}
	if e, ok := r.Lookup("bin/sh"); !ok || e.Type != "reg" {
		t.Errorf("bin/sh: %+v, want a hard link to busybox", e)
	}
}

func TestSandboxIsOfflineAndReportsWhatOutlivesIt(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("sandboxes need root")
	}
	work := t.TempDir()
	for _, sub := range []string{"tmp/mnt", "tools"} {
		if err := os.MkdirAll(filepath.Join(work, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	sb := sandbox{
		Work:  work,
		Env:   []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		Files: map[string]string{"/etc/resolv.conf": "nameserver 127.0.0.1\n"},
		Args:  []string{"sh", "-c", "getent hosts example.com && exit 9; mount -t tmpfs none " + inside + "/tmp/mnt; sleep 1000 & until grep -q ^sleep /proc/$!/cmdline; do :; done; exit 3"},
		Leaks: inside + "/leaks.json",
	}
	start := time.Now()
	err := sb.run(t.Context(), &out, &out)
	if err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("got %v, want exit status 3; output %s", err, out.String())
	}
	if d := time.Since(start); d > 10*time.Second {
		t.Errorf("took %s: names should be refused at once, and the end of process 1 should end everything", d)
	}
	b, err := os.ReadFile(filepath.Join(work, "leaks.json"))
	if err != nil {
		t.Fatal(err)
	}
	var l leftovers
	if err := json.Unmarshal(b, &l); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(l.Mounts, []string{"tmpfs on " + inside + "/tmp/mnt"}) || !slices.Equal(l.Processes, []string{"sleep 1000"}) {
		t.Errorf("leftovers %+v, want the tmpfs and the sleep", l)
	}
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(info), work) {
		t.Error("the sandbox left a mount outside")
	}
}

func TestNamesAreRefused(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	conn, err := (&net.ListenConfig{}).ListenPacket(ctx, "udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go refuseNames(conn)
	res := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "udp", conn.LocalAddr().String())
	}}
	_, err = res.LookupHost(ctx, "registry.example")
	if dnsErr, ok := errors.AsType[*net.DNSError](err); !ok || !dnsErr.IsNotFound {
		t.Errorf("got %v, want a name error", err)
	}
}
