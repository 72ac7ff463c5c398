package integration

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/baseimage"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/client"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/daemon"
	"github.com/buildkitd-lazy/buildkitd-lazy/integration/lab/registry"
)

// TestKilledAgainAndAgain kills one daemon after the other on one state directory, at random moments of builds, exports and prunes. The next one
// does what its predecessor was killed at. In the end a prune leaves nothing.
func TestKilledAgainAndAgain(t *testing.T) {
	const files, size = 12, 192 << 10
	type base struct {
		image baseimage.Image
		sums  []string // of its files, as sha256sum says them
	}
	var bases []base
	for i := range uint64(4) {
		entries := []baseimage.Entry{baseimage.Dir("big")}
		var sums []string
		for n := range uint64(files) {
			content := noise(i*files+n, size)
			entries = append(entries, baseimage.File(fmt.Sprintf("big/%d", n), content))
			sums = append(sums, fmt.Sprintf("%s  /big/%d\n", digest.FromString(content).Encoded(), n))
		}
		bases = append(bases, base{busybox(t, layer(t, "killed", entries...)), sums})
	}
	eachDoorAtOnce(t, func(t *testing.T, door []string) {
		reg := startRegistry(t, registry.Options{})
		for i, format := range []baseimage.Format{baseimage.EStargz, baseimage.ZstdChunked, baseimage.Gzip, baseimage.EStargz} {
			push(t, reg, fmt.Sprintf("base:%d", i), bases[i].image, format)
		}
		reg.Faults.Add(registry.Fault{Kind: registry.Slow, Delay: 10 * time.Millisecond})
		opt := daemon.Options{Config: plainHTTP(reg), Env: door, Root: t.TempDir()}

		// Each returns what went wrong.
		type action func(d *daemon.Daemon) error
		solve := func(on int, outputs ...string) action {
			from := reg.Ref(fmt.Sprintf("base:%d", on))
			s := client.Solve{NoCache: true, Outputs: outputs, Dockerfile: "FROM " + from + ` AS a
RUN sha256sum /big/* && cp -r /big /copy && sha256sum /copy/*
FROM ` + from + `
COPY --from=a /big /from
COPY --link --from=a /copy /linked
RUN --mount=type=cache,target=/cache sha256sum /from/* /linked/* && date >> /cache/dates
`}
			return func(d *daemon.Daemon) error {
				res, err := client.Buildctl{Addr: d.Addr}.Build(t.Context(), s)
				if err != nil {
					return err
				}
				if res.Err != "" {
					return fmt.Errorf("%s\n%s", res.Err, res.Output())
				}
				for _, sum := range bases[on].sums {
					for _, dir := range []string{"/big/", "/copy/", "/from/", "/linked/"} {
						if want := strings.Replace(sum, "/big/", dir, 1); !strings.Contains(res.Output(), want) {
							return fmt.Errorf("no %s in:\n%s", want, res.Output())
						}
					}
				}
				return nil
			}
		}
		prune := func(args ...string) action {
			return func(d *daemon.Daemon) error {
				if out, err := (client.Buildctl{Addr: d.Addr}).Run(t.Context(), append([]string{"prune"}, args...)...); err != nil {
					return fmt.Errorf("%w\n%s", err, out)
				}
				return nil
			}
		}
		builds := []action{solve(0), solve(1), solve(2), solve(3)}
		pushes := "type=image,push=true,name=" + reg.Ref("out:1") + ","
		what := map[string]action{
			"build on estargz":     builds[0],
			"build on zstdchunked": builds[1],
			"build on gzip":        builds[2],
			"push as estargz":      solve(0, pushes+"compression=estargz,force-compression=true"),
			"push as zstdchunked":  solve(1, pushes+"compression=zstdchunked"),
			"push and unpack":      solve(3, pushes+"compression=zstdchunked,force-compression=true,unpack=true,store=true"),
			"tar":                  solve(3, "type=oci,dest=/dev/null"),
			"files":                solve(1, "type=local,dest="+t.TempDir()),
			"prune":                prune(),
			"prune all":            prune("--all"),
		}
		took := map[string]time.Duration{}
		for i := range thorough(3, 60) {
			for name, do := range what { // any
				t.Run(fmt.Sprint(i, " ", name), func(t *testing.T) {
					d := startDaemon(t, opt)
					if strings.HasPrefix(name, "prune") {
						if err := builds[rand.N(len(builds))](d); err != nil {
							t.Error(err)
						}
					}
					most := took[name]
					if most == 0 {
						most = 2 * time.Second
					}
					moment := rand.N(most + most/10)
					t.Logf("killed after %v", moment)
					var wg sync.WaitGroup
					wg.Go(func() { _ = do(d) }) // it's killed
					time.Sleep(moment)
					d.Kill()
					wg.Wait()
					next := startDaemon(t, opt)
					begin := time.Now()
					if err := do(next); err != nil {
						t.Error(err)
					}
					took[name] = time.Since(begin)
				})
				break
			}
		}
		d := startDaemon(t, opt)
		if err := prune("--all")(d); err != nil {
			t.Error(err)
		}
		// Not of content/ingest, from where downloads go on within a day.
		for _, pattern := range []string{"snapshots/snapshotter/snapshots/*", "snapshots/store/layers/*", "executor/hosts.*"} {
			var left []string
			for begin := time.Now(); time.Since(begin) < 10*time.Second; time.Sleep(50 * time.Millisecond) {
				var err error
				if left, err = filepath.Glob(filepath.Join(d.Root, "runc-stargz", pattern)); err != nil {
					t.Fatal(err)
				}
				if len(left) == 0 {
					break
				}
			}
			if len(left) > 0 {
				t.Errorf("after a prune there is %q", left)
			}
		}
		stopDaemon(t, d)
	})
}
