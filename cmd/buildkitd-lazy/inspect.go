package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"text/template"

	"github.com/containerd/platforms"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v3"

	"github.com/buildkitd-lazy/buildkitd-lazy/inspect"
	"github.com/buildkitd-lazy/buildkitd-lazy/repository"
)

func inspectCommand() *cli.Command {
	flags := append(registryFlags(),
		platformFlag("look at"),
		&cli.BoolFlag{Name: "fail-if-eager", Usage: "exit with status 2 when a layer isn't lazy"},
		formatFlag("the report"),
	)
	for _, f := range flags {
		place(f, "")
	}
	return &cli.Command{
		Name:      "inspect",
		Usage:     "say which layers of an image are lazy, and why the others aren't",
		ArgsUsage: "REF",
		Description: "REF is an image in a registry, or oci-layout://DIR[:TAG|@DIGEST].\n" +
			"Of each layer little more than the table of contents is read. Credentials are docker's.\n" +
			"Exit status 1 means that the image can't be read, 2 that a layer isn't lazy and --fail-if-eager is given.",
		Flags:        flags,
		Action:       inspectImage,
		OnUsageError: usageError,
	}
}

func platformFlag(what string) *cli.StringSliceFlag {
	return &cli.StringSliceFlag{Name: "platform", Usage: "`PLATFORM` to " + what + " (such as linux/amd64) instead of all; repeatable"}
}

func formatFlag(of string) *cli.StringFlag {
	return &cli.StringFlag{Name: "format", Usage: "json, or a Go `TEMPLATE` for " + of + ", such as '{{json .}}'"}
}

// eagerError is what --fail-if-eager ends with.
type eagerError []string

func (e eagerError) Error() string {
	if len(e) == 1 {
		return "a layer isn't lazy: " + e[0]
	}
	return fmt.Sprintf("%d layers aren't lazy: %s", len(e), strings.Join(e, "; "))
}

// ExitStatus implements exitStatuser.
func (e eagerError) ExitStatus() int { return 2 }

func inspectImage(ctx context.Context, c *cli.Command) error {
	if c.NArg() != 1 {
		return fmt.Errorf("inspect takes one image, got %d arguments; %s --help shows how", c.NArg(), c.FullName())
	}
	onlyErrors(c)
	format, err := parseFormat(c, inspect.Report{Images: []inspect.Image{{Layers: make([]inspect.Layer, 1)}}})
	if err != nil {
		return err
	}
	wanted, err := wantedPlatforms(c)
	if err != nil {
		return err
	}
	hosts, err := registryHosts(c)
	if err != nil {
		return err
	}
	repo, err := repository.Parse(c.Args().First(), hosts)
	if err != nil {
		return err
	}
	ctx, stop := untilSignal(ctx)
	defer stop()
	report, err := inspect.Inspect(ctx, repo, inspect.Options{Platforms: wanted})
	if err != nil {
		return err
	}
	out := c.Root().Writer
	if format != nil {
		err = executeFormat(out, format, report)
	} else {
		err = printInspection(out, report)
	}
	if err != nil {
		return err
	}
	if eager := report.Eager(); len(eager) > 0 && c.Bool("fail-if-eager") {
		return eagerError(eager)
	}
	return nil
}

// wantedPlatforms returns what --platform says, nil if it isn't given.
func wantedPlatforms(c *cli.Command) ([]ocispecs.Platform, error) {
	var wanted []ocispecs.Platform
	for _, v := range c.StringSlice("platform") {
		for s := range strings.SplitSeq(v, ",") {
			p, err := platforms.Parse(strings.TrimSpace(s))
			if err != nil {
				return nil, fmt.Errorf("--platform=%s: %w; want one such as linux/amd64", v, err)
			}
			wanted = append(wanted, platforms.Normalize(p))
		}
	}
	return wanted, nil
}

// parseFormat returns the template that --format asks for, nil if it isn't given. It is tried on a sample, so that a field that isn't there
// is an error before the work is done.
func parseFormat(c *cli.Command, sample any) (*template.Template, error) {
	text := c.String("format")
	switch text {
	case "":
		return nil, nil
	case "json":
		text = "{{json .}}"
	}
	t, err := template.New("--format").Funcs(template.FuncMap{"json": marshal}).Parse(text)
	if err != nil {
		return nil, fmt.Errorf("--format: %w", err)
	}
	// Of other errors the sample may be the cause, which has less in it.
	if err := t.Execute(io.Discard, sample); err != nil && strings.Contains(err.Error(), "can't evaluate field") {
		return nil, fmt.Errorf("--format: %w", err)
	}
	return t, nil
}

func executeFormat(out io.Writer, format *template.Template, v any) error {
	if err := format.Execute(out, v); err != nil {
		return fmt.Errorf("--format: %w", err)
	}
	_, err := fmt.Fprintln(out)
	return err
}

func printInspection(out io.Writer, r inspect.Report) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "%s\n%s\n", r.Ref, r.Digest)
	for _, im := range r.Images {
		fmt.Fprintf(w, "\n%s: lazy %d of %d layers, %s\n", im.Platform, im.Lazy, len(im.Layers), bytesOf(im.Size))
		fmt.Fprintln(w, "LAYER\tFORMAT\tSIZE\tTOC\tENTRIES\tCHUNKS\tLANDMARK\tLAZY")
		for _, l := range im.Layers {
			if !l.Lazy {
				fmt.Fprintf(w, "%s\t%s\t%s\t-\t-\t-\t-\tno: %s\n", l.Digest, l.Format, bytesOf(l.Size), l.Reason)
				continue
			}
			landmark := l.Landmark
			if l.Prefetch > 0 {
				landmark += " " + bytesOf(l.Prefetch)
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%d\t%s\tyes\n", l.Digest, l.Format, bytesOf(l.Size), bytesOf(l.TOCSize), l.Entries, l.Chunks, landmark)
		}
		if err := w.Flush(); err != nil {
			return err
		}
	}
	if strings.HasPrefix(r.Ref, repository.LayoutPrefix) {
		fmt.Fprintln(w, "\nLayers are lazy once the image is in a registry: builds read an OCI layout whole.")
	}
	return w.Flush()
}
