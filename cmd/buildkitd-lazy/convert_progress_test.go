package main

import (
	"io"
	"os"
	"strings"
	"testing"

	"github.com/containerd/console"
	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/convert"
)

// On a terminal it's said that something is converted, not built.
func TestConversionOnTerminal(t *testing.T) {
	master, path, err := console.NewPty()
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	if err := master.Resize(console.WinSize{Width: 100, Height: 30}); err != nil {
		t.Fatal(err)
	}
	terminal, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	said := make(chan string)
	go func() {
		b, _ := io.ReadAll(master) // EIO is how it ends
		said <- string(b)
	}()
	d, err := showConversion(terminal, "tty")
	if err != nil {
		t.Fatal(err)
	}
	layer := convert.Layer{Digest: digest.FromString("x"), Size: 10, Platform: "linux/amd64"}
	d.update(convert.Update{Layer: layer, Action: convert.Converted})
	d.update(convert.Update{Layer: layer, Action: convert.Converted, Read: 10, Done: true})
	d.end()
	if err := terminal.Close(); err != nil {
		t.Error(err)
	}
	if got := <-said; !strings.Contains(got, "[+] Converting") || !strings.Contains(got, "convert layer "+layer.Digest.String()[:20]) || strings.Contains(got, "Building") {
		t.Errorf("on the terminal is %q", got)
	}
}
