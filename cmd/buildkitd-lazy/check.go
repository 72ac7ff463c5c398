package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	bkconfig "github.com/moby/buildkit/cmd/buildkitd/config"
	"github.com/urfave/cli/v3"

	"github.com/buildkitd-lazy/buildkitd-lazy/config"
	"github.com/buildkitd-lazy/buildkitd-lazy/host"
	"github.com/buildkitd-lazy/buildkitd-lazy/mount/erofs"
	"github.com/buildkitd-lazy/buildkitd-lazy/mount/fuse"
)

// checkResult is what `check` prints; its JSON is the command's interface for programs.
type checkResult struct {
	host.Report

	Builds bool   `json:"builds"` // whether any build can run here
	Lazy   string `json:"lazy"`   // the door through which lazy layers will be served: "erofs", "fuse" or "off"
	Reason string `json:"reason"` // why, one sentence
}

func checkCommand(def *bkconfig.Config) *cli.Command {
	flags := []cli.Flag{
		configFlag(),
		rootFlag(def),
		ociBinaryFlag(def),
		lazyMountFlag(),
		formatFlag("the result"),
	}
	for _, f := range flags {
		place(f, "")
	}
	return &cli.Command{
		Name:  "check",
		Usage: "say what this host offers, what will be used, and how to get what is missing",
		Description: "Tries out what the daemon would do, beside a running daemon if need be, and changes nothing.\n" +
			"Exit status 1 means that no build can run here. Builds run without lazy layers where only these are missing.",
		Flags:        flags,
		Action:       check,
		OnUsageError: usageError,
	}
}

func check(ctx context.Context, c *cli.Command) error {
	if c.Args().Present() {
		return fmt.Errorf("check takes no arguments, got %q", c.Args().First())
	}
	format, err := parseFormat(c, checkResult{Report: host.Report{Checks: make([]host.Check, 1)}})
	if err != nil {
		return err
	}
	// The flags may stand on either side of the word check.
	value := func(name string) (string, bool) {
		if root := c.Root(); !c.IsSet(name) && root.IsSet(name) {
			return root.String(name), true
		}
		return c.String(name), c.IsSet(name)
	}
	path, _ := value("config")
	file, err := config.Load(path)
	if err != nil {
		return err
	}
	cfg, mount := file.BuildKit, file.Lazy.Mount
	setDefaults(&cfg)
	if v, ok := value("root"); ok {
		cfg.Root = v
	}
	if v, ok := value("oci-worker-binary"); ok {
		cfg.Workers.OCI.Binary = v
	}
	if v, ok := value("lazy-mount"); ok {
		if mount, err = config.ParseMount(v); err != nil {
			return fmt.Errorf("--lazy-mount (or BUILDKITD_LAZY_MOUNT): %w; want auto, erofs, fuse or off", err)
		}
	}

	report := host.Probe(ctx, host.Options{
		StateDir: cfg.Root, Binary: cfg.Workers.OCI.Binary, FUSEDoor: fuse.Probe, EROFSDoor: erofs.Probe,
	})
	var missing []string
	for _, m := range report.Missing() {
		missing = append(missing, m.Name)
	}
	door, reason := report.Door(mount)
	switch name := orAuto(cfg.Workers.OCI.Snapshotter); {
	case cfg.Workers.OCI.ProxySnapshotterPath != "":
		door, reason = host.DoorOff, "a proxy snapshotter is configured"
	case name != "auto" && name != "stargz":
		door, reason = host.DoorOff, fmt.Sprintf("the snapshotter %q is configured", name)
	case door == host.DoorOff && (mount == config.MountEROFS || mount == config.MountFUSE):
		missing = append(missing, fmt.Sprintf("%s mounts, which mount = %q asks for,", strings.ToUpper(mount), mount))
	}
	result := checkResult{Report: report, Builds: len(missing) == 0, Lazy: door, Reason: reason}

	out := c.Root().Writer
	if format != nil {
		err = executeFormat(out, format, result)
	} else {
		err = printCheck(out, result)
	}
	if err != nil {
		return err
	}
	if len(missing) > 0 {
		return errors.New("no build can run on this host: " + strings.Join(missing, ", ") + " missing")
	}
	return nil
}

func printCheck(out io.Writer, r checkResult) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, c := range r.Checks {
		state := "ok"
		switch {
		case !c.OK && c.Required:
			state = "MISSING"
		case !c.OK:
			state = "missing"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", c.Name, state, c.Detail)
		if c.Fix != "" {
			fmt.Fprintf(w, "\t\t-> %s\n", c.Fix)
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	builds := "run here"
	if !r.Builds {
		builds = "cannot run here"
	}
	_, err := fmt.Fprintf(out, "\nbuilds %s\nlazy layers: %s (%s)\n", builds, r.Lazy, r.Reason)
	return err
}

func marshal(v any) (string, error) {
	b, err := json.Marshal(v)
	return string(b), err
}
