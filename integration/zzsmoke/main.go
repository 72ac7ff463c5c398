package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func main() {
	ctx := context.Background()
	cache := must(baseimage.CacheDir())
	reg := must(registry.Start(registry.Options{Dir: "/tmp/smoke/reg"}))
	im := must(baseimage.Go(ctx, cache))
	t := time.Now()
	img := must(im.Build(ctx, baseimage.EStargz))
	must(baseimage.Push(ctx, reg, "base:estargz", img))
	fmt.Println("built estargz", time.Since(t))
	mix := must(im.Build(ctx, baseimage.EStargz, baseimage.Gzip, baseimage.EStargz, baseimage.Zstd))
	must(baseimage.Push(ctx, reg, "base:mixed", mix))
	gz := must(im.Build(ctx, baseimage.Gzip))
	must(baseimage.Push(ctx, reg, "base:gzip", gz))
	os.WriteFile("/tmp/smoke/host", []byte(reg.Host), 0o644)
	fmt.Println(reg.Host)
	reg.Log.Reset()
	for {
		time.Sleep(2 * time.Second)
		if _, err := os.Stat("/tmp/smoke/dump"); err == nil {
			os.Remove("/tmp/smoke/dump")
			for _, e := range reg.Log.Entries() {
				fmt.Printf("%+v\n", e)
			}
			fmt.Println("----", reg.Log.Bytes())
			reg.Log.Reset()
		}
	}
}
