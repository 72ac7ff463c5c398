//go:build venus

package main

import (
	_ "github.com/moby/buildkit/contrib/cdisetup/venus" // sets up Venus virtual GPUs on demand
)
