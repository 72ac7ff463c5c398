# Everything a person or CI does with this repository. `make help` lists it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

GO      ?= go
PREFIX  ?= /usr/local
DESTDIR ?=

# The daemon and the test tools are static: they run on busybox, in an empty image, on any libc.
export CGO_ENABLED ?= 0

# Without a tag to describe, the version is the one in the source; the revision tells builds apart.
VERSION  ?= $(shell git describe --match 'v[0-9]*' --dirty=.m --tags 2>/dev/null)
REVISION ?= $(shell git rev-parse HEAD 2>/dev/null)$(shell git diff --quiet HEAD 2>/dev/null || echo .m)
LDFLAGS  := $(if $(VERSION),-X main.version=$(VERSION)) $(if $(filter-out .m,$(REVISION)),-X main.revision=$(REVISION))

# How long one fuzz target runs, and what the tests of one package may take, on a machine that is four times slower than it should be; then
# the end-to-end tests.
FUZZTIME            ?= 10s
UNIT_TIMEOUT        ?= 20m
INTEGRATION_TIMEOUT ?= 30m
TESTFLAGS           ?=
UPSTREAM            ?=
BENCH               ?=
MICROBENCH          ?=

export PATH := $(CURDIR)/bin:$(CURDIR)/bin/tools:$(PATH)

.PHONY: help
help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "; print "Usage: make <target>\n"} /^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build bin/buildkitd-lazy
	$(GO) build -buildvcs=false -ldflags '$(LDFLAGS)' -o bin/buildkitd-lazy ./cmd/buildkitd-lazy

.PHONY: tools
tools: ## Build the test tools: stock buildkitd and buildctl, docker-buildx
	cd integration && $(GO) build -o ../bin/tools/ github.com/moby/buildkit/cmd/buildkitd github.com/moby/buildkit/cmd/buildctl
	cd integration && $(GO) build -o ../bin/tools/docker-buildx github.com/docker/buildx/cmd/buildx

.PHONY: deps
deps: ## Install by apt-get what the tests need and this machine lacks
	hack/deps.sh test

.PHONY: test
test: deps unit integration ## Unit and integration tests, after deps

.PHONY: unit
unit: ## Tests of the product's packages
	$(GO) test -timeout $(UNIT_TIMEOUT) $(TESTFLAGS) ./...

.PHONY: race
race: ## Tests of the product's packages under the race detector, of random inputs a fifth
	CGO_ENABLED=1 $(GO) test -race -short -timeout $(UNIT_TIMEOUT) $(TESTFLAGS) ./...

.PHONY: integration
integration: build tools ## End-to-end tests: real binary, registry, mounts, Dockerfiles
	cd integration/upstream && $(GO) test $(TESTFLAGS) ./...
	cd integration && $(GO) test -timeout $(INTEGRATION_TIMEOUT) $(TESTFLAGS) ./...

.PHONY: reliability
reliability: build tools ## The same tests of reliability at length: 50 kills, 200 cold builds, each through both doors
	cd integration && RELIABILITY=full $(GO) test -count=1 -timeout $(INTEGRATION_TIMEOUT) -run 'MidRUN|DuringRUN|KilledAtAnyMoment|KilledAgainAndAgain|ColdBuilds|ConcurrentBuilds|Corrupt|FlippedByte' -v $(TESTFLAGS) .

.PHONY: upstream
upstream: build tools ## BuildKit's own integration tests against stock and ours; UPSTREAM='-run ^TestCopy' for some
	hack/deps.sh test
	cd integration/upstream && $(GO) run . $(UPSTREAM)

.PHONY: fuzz
fuzz: ## Run every fuzz target for FUZZTIME (10s)
	hack/fuzz.sh $(FUZZTIME)

.PHONY: lint
lint: bin/tools/golangci-lint ## golangci-lint over every module
	hack/lint.sh

bin/tools/golangci-lint: hack/lint/go.mod hack/lint/go.sum
	cd hack/lint && $(GO) build -o ../../bin/tools/golangci-lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint

.PHONY: image
image: build tools ## Build the driver image for docker buildx with our own daemon
	hack/image.sh

.PHONY: demo
demo: build tools ## Lazy beside stock on a real development image, in a short table
	hack/deps.sh demo
	cd integration && $(GO) build -o ../bin/demo ./cmd/demo
	bin/demo

.PHONY: bench
bench: build tools ## Measure against stock BuildKit, over an hour; BENCH='-link all -json FILE' and other flags of bin/bench
	hack/deps.sh bench
	cd integration && $(GO) build -o ../bin/bench ./cmd/bench
	bin/bench $(BENCH)

.PHONY: bench-quick
bench-quick: build tools ## The same in under five minutes: one link, the Go image
	hack/deps.sh demo
	cd integration && $(GO) build -o ../bin/bench ./cmd/bench
	bin/bench -quick $(BENCH)

.PHONY: microbench
microbench: ## The packages' own benchmarks, as benchstat wants them, some minutes; MICROBENCH='-bench Open -count 10' for some
	$(GO) test -run '^$$' -bench . $(MICROBENCH) ./layer/... ./store ./fill ./mount/... ./snapshot

.PHONY: install
install: build ## Install the daemon below DESTDIR and PREFIX (/usr/local)
	install -D -m 0755 bin/buildkitd-lazy $(DESTDIR)$(PREFIX)/bin/buildkitd-lazy

.PHONY: clean
clean: ## Remove what the targets above built
	rm -rf bin

.PHONY: ci
ci: deps lint unit race integration ## What .ci/run runs
