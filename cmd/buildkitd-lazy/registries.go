package main

import (
	"fmt"
	"net/http"
	"os"
	"sync"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	dockerconfig "github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/configfile"
	resolverconfig "github.com/moby/buildkit/util/resolver/config"
	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v3"

	"github.com/buildkitd-lazy/buildkitd-lazy/config"
	"github.com/buildkitd-lazy/buildkitd-lazy/repository"
	"github.com/buildkitd-lazy/buildkitd-lazy/worker"
)

// registryFlags are those of the commands that talk to registries by themselves, without a daemon.
func registryFlags() []cli.Flag {
	return []cli.Flag{
		configFlag(),
		&cli.StringSliceFlag{
			Name:  "insecure",
			Usage: "`HOST` of a registry whose certificate isn't checked, and that is asked over plain HTTP if it speaks no TLS; repeatable",
		},
	}
}

// registryHosts returns the hosts of registries as buildkitd.toml has them, with the credentials that docker has.
func registryHosts(c *cli.Command) (repository.Hosts, error) {
	path, root := c.String("config"), c.Root()
	if !c.IsSet("config") && root.IsSet("config") {
		path = root.String("config") // the flag may stand in front of the command
	}
	if c.IsSet("config") || root.IsSet("config") {
		// The daemon does without, as stock's. Here it would be a registry asked in another way than somebody wants.
		if _, err := os.Stat(path); err != nil {
			return nil, fmt.Errorf("--config: %w", err)
		}
	}
	file, err := config.Load(path)
	if err != nil {
		return nil, err
	}
	registries := file.BuildKit.Registries
	for _, host := range c.StringSlice("insecure") {
		if registries == nil {
			registries = map[string]resolverconfig.RegistryConfig{}
		}
		r := registries[host]
		r.Insecure, r.PlainHTTP = new(true), new(true)
		registries[host] = r
	}
	return withCredentials(worker.RegistryHosts(registries)), nil
}

// withCredentials adds authorizers, one for each registry: it is what remembers tokens.
func withCredentials(hosts docker.RegistryHosts) repository.Hosts {
	load := sync.OnceValues(func() (*configfile.ConfigFile, error) { return dockerconfig.Load(dockerconfig.Dir()) })
	var mu sync.Mutex
	known := map[string][]docker.RegistryHost{}
	return func(registry string) ([]docker.RegistryHost, error) {
		mu.Lock()
		defer mu.Unlock()
		if hs, ok := known[registry]; ok {
			return hs, nil
		}
		hs, err := hosts(registry)
		if err != nil {
			return nil, fmt.Errorf("registry %s: %w", registry, err)
		}
		for i := range hs {
			hs[i].Authorizer = newAuthorizer(hs[i].Client, load)
		}
		known[registry] = hs
		return hs, nil
	}
}

// dockerHub is the host that serves docker.io, and dockerHubKey what docker calls it in its config.json.
const (
	dockerHub    = "registry-1.docker.io"
	dockerHubKey = "https://index.docker.io/v1/"
)

func newAuthorizer(client *http.Client, load func() (*configfile.ConfigFile, error)) docker.Authorizer {
	return docker.NewDockerAuthorizer(docker.WithAuthClient(client), docker.WithAuthCreds(func(host string) (string, string, error) {
		file, err := load()
		if err != nil {
			return "", "", fmt.Errorf("docker's configuration: %w", err)
		}
		key := host
		if host == dockerHub {
			key = dockerHubKey
		}
		auth, err := file.GetAuthConfig(key)
		if err != nil {
			return "", "", fmt.Errorf("docker's credentials for %s: %w", host, err)
		}
		if auth.IdentityToken != "" {
			return "", auth.IdentityToken, nil
		}
		return auth.Username, auth.Password, nil
	}))
}

// onlyErrors keeps the libraries from logging what a command is going to say itself.
func onlyErrors(c *cli.Command) {
	if !c.Root().Bool("debug") {
		logrus.SetLevel(logrus.ErrorLevel)
	}
}
