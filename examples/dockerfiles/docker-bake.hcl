# Every example, twice. "cold" ignores what the builder has cached, so each step runs;
# "warm" takes what it can from the cache. Run cold, then warm, and compare.
#
#   docker buildx bake -f docker-bake.hcl cold
#   docker buildx bake -f docker-bake.hcl warm
#
# REGISTRY holds the base images; GO_BASE and DEBIAN_BASE name them if yours are called otherwise.

variable "REGISTRY" {
  default = "localhost:5000"
}

variable "GO_BASE" {
  default = "${REGISTRY}/dev/go:estargz"
}

variable "DEBIAN_BASE" {
  default = "${REGISTRY}/dev/debian:estargz"
}

# Where results go: "type=cacheonly" builds and keeps nothing; "type=registry" pushes.
variable "OUTPUT" {
  default = "type=cacheonly"
}

# Appended to the tags below, which matter only when something is pushed or loaded.
variable "TAG" {
  default = "latest"
}

group "default" {
  targets = ["warm"]
}

group "cold" {
  targets = ["go-service-cold", "c-static-cold", "python-numpy-cold", "copy-tree-cold"]
}

group "warm" {
  targets = ["go-service", "c-static", "python-numpy", "copy-tree"]
}

# What the examples print about themselves, into ./out: used to check them.
group "check" {
  targets = ["go-service-binary", "go-service-test", "c-static-binary", "python-numpy-check", "copy-tree-listing"]
}

target "_common" {
  output = [OUTPUT]
}

target "_cold" {
  no-cache = true
}

target "go-service" {
  inherits = ["_common"]
  context  = "go-service"
  args     = { BASE = GO_BASE }
  tags     = ["${REGISTRY}/examples/go-service:${TAG}"]
}

target "c-static" {
  inherits = ["_common"]
  context  = "c-static"
  args     = { BASE = DEBIAN_BASE }
  tags     = ["${REGISTRY}/examples/c-static:${TAG}"]
}

target "python-numpy" {
  inherits = ["_common"]
  context  = "python-numpy"
  args     = { BASE = DEBIAN_BASE }
  tags     = ["${REGISTRY}/examples/python-numpy:${TAG}"]
}

target "copy-tree" {
  inherits = ["_common"]
  context  = "copy-tree"
  target   = "tree"
  args     = { BASE = GO_BASE }
  tags     = ["${REGISTRY}/examples/copy-tree:${TAG}"]
}

target "go-service-cold" {
  inherits = ["go-service", "_cold"]
}

target "c-static-cold" {
  inherits = ["c-static", "_cold"]
}

target "python-numpy-cold" {
  inherits = ["python-numpy", "_cold"]
}

target "copy-tree-cold" {
  inherits = ["copy-tree", "_cold"]
}

target "go-service-test" {
  inherits = ["go-service"]
  target   = "test"
  tags     = []
  output   = ["type=cacheonly"]
}

target "go-service-binary" {
  inherits = ["go-service"]
  target   = "binary"
  tags     = []
  output   = ["type=local,dest=out/go-service"]
}

target "c-static-binary" {
  inherits = ["c-static"]
  tags     = []
  output   = ["type=local,dest=out/c-static"]
}

target "python-numpy-check" {
  inherits = ["python-numpy"]
  target   = "check"
  tags     = []
  output   = ["type=local,dest=out/python-numpy"]
}

target "copy-tree-listing" {
  inherits = ["copy-tree"]
  target   = "listing"
  tags     = []
  output   = ["type=local,dest=out/copy-tree"]
}
