package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/docker/go-units"
	"github.com/urfave/cli/v3"

	"github.com/buildkitd-lazy/buildkitd-lazy/convert"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/order"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstdchunked"
	"github.com/buildkitd-lazy/buildkitd-lazy/repository"
)

func convertCommand() *cli.Command {
	flags := append(registryFlags(),
		platformFlag("convert"),
		&cli.StringFlag{Name: "compression", Usage: "`FORMAT` of the layers, estargz or zstdchunked", Value: "estargz"},
		&cli.StringFlag{Name: "compression-level", Usage: "`LEVEL`, -2 to 9 of estargz, 0 to 22 of zstdchunked", DefaultText: "the format's"},
		&cli.StringFlag{Name: "estargz-chunk-size", Usage: "`SIZE` of what is fetched and verified at once, such as 1MiB", DefaultText: "4MiB"},
		&cli.StringFlag{Name: "estargz-min-chunk-size", Usage: "`SIZE` up to which small files share a gzip stream, such as 64k", DefaultText: "64k; 0 lets none do"},
		&cli.StringFlag{Name: "zstdchunked-chunk-size", Usage: "`SIZE` of what is fetched and verified at once, such as 1MiB", DefaultText: "4MiB"},
		&cli.StringFlag{Name: "lazy-prioritize", Usage: "`FILE` with a list of the files that come first in their layers, as for exports"},
		&cli.StringSliceFlag{Name: "cache-from", Usage: "`IMAGE` converted before, whose layers need not be converted again; repeatable. That of DST is always looked at"},
		&cli.StringFlag{Name: "state", Usage: "`DIR` that remembers which layers have been converted", DefaultText: "buildkitd-lazy/convert in the user's cache directory"},
		&cli.BoolFlag{Name: "no-cache", Usage: "convert layers again that have been before"},
		&cli.IntFlag{Name: "jobs", Usage: "`NUMBER` of layers that are converted at once", DefaultText: "one for each CPU, and at least 2"},
		&cli.StringFlag{Name: "progress", Usage: "`TYPE` of progress: auto, plain, tty, quiet or rawjson", Value: "auto"},
		formatFlag("the result"),
	)
	for _, f := range flags {
		place(f, "")
	}
	return &cli.Command{
		Name:      "convert",
		Usage:     "make a lazy image of any",
		ArgsUsage: "SRC DST",
		Description: "SRC is an image in a registry, or oci-layout://DIR[:TAG|@DIGEST]; DST is a tag in a registry, or oci-layout://DIR[:TAG].\n" +
			"Layers stream from one to the other. Those that were converted before are not moved. Credentials are docker's.\n" +
			"Prints the name and the digest of the image. Exit status 1 means that there is none, 130 that it was interrupted;\n" +
			"layers that are complete are not converted again by the next try.",
		Flags:        flags,
		Action:       convertImage,
		OnUsageError: usageError,
	}
}

func convertImage(ctx context.Context, c *cli.Command) (err error) {
	onlyErrors(c)
	if c.NArg() != 2 {
		return fmt.Errorf("convert takes a source and a destination, got %d arguments; %s --help shows how", c.NArg(), c.FullName())
	}
	format, err := parseFormat(c, convert.Result{Layers: make([]convert.LayerResult, 1)})
	if err != nil {
		return err
	}
	opt, err := convertOptions(c)
	if err != nil {
		return err
	}
	hosts, err := registryHosts(c)
	if err != nil {
		return err
	}
	src, err := repository.Parse(c.Args().Get(0), hosts)
	if err != nil {
		return err
	}
	dst, err := repository.Parse(c.Args().Get(1), hosts)
	if err != nil {
		return err
	}
	for _, ref := range c.StringSlice("cache-from") {
		former, err := repository.Parse(ref, hosts)
		if err != nil {
			return fmt.Errorf("--cache-from: %w", err)
		}
		opt.Former = append(opt.Former, former)
	}
	ctx, stop := untilSignal(ctx)
	defer stop()
	shown, err := showConversion(c.Root().ErrWriter, c.String("progress"))
	if err != nil {
		return err
	}
	opt.Progress = shown.update
	result, err := convert.Convert(ctx, src, dst, opt)
	shown.end()
	if err != nil {
		if stopped := context.Cause(ctx); stopped != nil {
			return fmt.Errorf("%s is not written: %w", dst, stopped)
		}
		return err
	}
	warn(c, result)
	out := c.Root().Writer
	if format != nil {
		if err := executeFormat(out, format, result); err != nil {
			return fmt.Errorf("%s@%s is written, but can't be told of as wanted: %w", result.Ref, result.Digest, err)
		}
		return nil
	}
	_, err = fmt.Fprintf(out, "%s@%s\n", result.Ref, result.Digest)
	return err
}

// warn says what is not as it was probably meant.
func warn(c *cli.Command, result convert.Result) {
	first, converted, reused := 0, false, false
	for _, l := range result.Layers {
		if !l.Lazy {
			fmt.Fprintf(c.Root().ErrWriter, "layer %s isn't lazy: %s\n", l.To, l.Reason)
		}
		first += l.First
		converted = converted || l.Action == convert.Converted
		reused = reused || l.Action == convert.Reused // nobody knows any more how many files come first in it
	}
	for _, ref := range result.Absent {
		fmt.Fprintf(c.Root().ErrWriter, "--cache-from: there is no %s; none of its layers could be reused\n", ref)
	}
	list := c.String("lazy-prioritize")
	switch {
	case list == "" || first > 0 || reused:
	case converted:
		fmt.Fprintf(c.Root().ErrWriter, "--lazy-prioritize=%s: none of its paths is in a layer that was converted; a directory stands for itself: DIR/** is what is in it\n", list)
	default:
		fmt.Fprintf(c.Root().ErrWriter, "--lazy-prioritize=%s: no layer was converted; those that are lazy already stay as they are\n", list)
	}
}

// convertOptions are what the flags say, but for images.
func convertOptions(c *cli.Command) (opt convert.Options, err error) {
	if opt.Format, err = layerFormat(c); err != nil {
		return opt, err
	}
	if opt.Platforms, err = wantedPlatforms(c); err != nil {
		return opt, err
	}
	if opt.Jobs = c.Int("jobs"); opt.Jobs < 0 {
		return opt, fmt.Errorf("--jobs=%d: want a number from 1", opt.Jobs)
	}
	opt.Anew = c.Bool("no-cache")
	if dir := c.String("state"); dir != "" {
		opt.State, err = convert.OpenState(dir)
		return opt, err
	}
	if cache, err := os.UserCacheDir(); err == nil {
		// If there can't be one, the destination is all that remembers.
		opt.State, _ = convert.OpenState(filepath.Join(cache, "buildkitd-lazy", "convert"))
	}
	return opt, nil
}

// layerFormat is what --compression and its options say.
func layerFormat(c *cli.Command) (convert.Format, error) {
	name := c.String("compression")
	least, most := -2, 9
	switch name {
	case "estargz":
	case "zstdchunked":
		least, most = 0, 22
	default:
		return nil, fmt.Errorf("--compression=%s: there is no such format of lazy layers; want estargz or zstdchunked", name)
	}
	var level *int
	if s := c.String("compression-level"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < least || n > most {
			return nil, fmt.Errorf("--compression-level=%s: %s has levels %d to %d", s, name, least, most)
		}
		level = &n
	}
	eopt, zopt := estargz.WriteOptions{Level: level}, zstdchunked.WriteOptions{Level: level}
	for _, f := range []struct {
		name  string
		of    string
		least int64
		to    *int64
	}{
		{"estargz-chunk-size", "estargz", 4 << 10, &eopt.ChunkSize},
		{"estargz-min-chunk-size", "estargz", 0, &eopt.MinChunkSize},
		{"zstdchunked-chunk-size", "zstdchunked", 4 << 10, &zopt.ChunkSize},
	} {
		s := c.String(f.name)
		if s == "" {
			continue
		}
		if name != f.of {
			return nil, fmt.Errorf("--%s=%s is for --compression=%s only", f.name, s, f.of)
		}
		n, err := units.RAMInBytes(s)
		if err != nil || n < f.least || n > estargz.MaxChunkSize {
			return nil, fmt.Errorf("--%s=%s: want %d to %d bytes, or a number with a unit as in 64k or 4MiB", f.name, s, f.least, int64(estargz.MaxChunkSize))
		}
		*f.to = max(n, 1) // 0 is no default here: each file by itself, which takes one byte at least
	}
	path := c.String("lazy-prioritize")
	if name == "zstdchunked" {
		if path != "" {
			return nil, fmt.Errorf("--lazy-prioritize=%s is for --compression=estargz only", path)
		}
		return convert.NewZstdChunked(zopt), nil
	}
	format := convert.NewEStargz(eopt)
	if path == "" {
		return format, nil
	}
	list, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("--lazy-prioritize: %w", err)
	}
	parsed, err := order.Parse(list)
	if err != nil {
		return nil, fmt.Errorf("--lazy-prioritize=%s: %w", path, err)
	}
	return convert.InOrder(format, parsed, ""), nil
}
