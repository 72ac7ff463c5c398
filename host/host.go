// Package host finds out what the machine offers a lazy BuildKit daemon: by trying, not by guessing from version
// numbers. A mount that the daemon would make later is made here, on the filesystem that holds the state directory,
// and taken away again at once.
//
// [Probe] returns a [Report]: one [Check] for each thing the daemon needs or could use, with what was seen and, where
// it is missing, how to get it. `buildkitd-lazy check` prints the report; the daemon asks its [Report.Door] which way
// lazy layers are served.
//
// # Guarantees
//
// Probing changes nothing that outlives it. The state directory is not created when it does not exist: its nearest
// existing parent stands in for it, as it is on the same filesystem. Everything is tried in a temporary directory
// there, whose name begins with [TempPrefix]. Probing starts no process but `<runtime> --version` and `git --version`,
// which the context ends. A Probe may run beside a daemon that uses the same state directory.
//
// # Failure modes
//
// Probe does not fail: what could not be tried is reported as missing, with the error in its detail. A SIGKILL between
// a mount and its unmount, a few microseconds, leaves an empty mount below the temporary directory.
package host

import (
	"fmt"
	"strings"
)

// Names of the checks, in the order of the report.
const (
	Kernel     = "kernel"
	Privileges = "privileges"
	StateDir   = "state directory"
	Overlayfs  = "overlayfs"
	Runtime    = "runc"
	FUSE       = "fuse"
	EROFS      = "erofs"
	PreContent = "pre-content events"
	Cgroup     = "cgroup"
	Git        = "git"
)

// The doors through which lazy layers are served, as [Report.Door] names them.
const (
	DoorEROFS = "erofs" // a kernel filesystem per layer, filled by pre-content events
	DoorFUSE  = "fuse"  // a FUSE filesystem per layer
	DoorOff   = "off"   // every layer is pulled and unpacked before it is used
)

// TempPrefix begins the name of the directory that a probe works in.
const TempPrefix = ".buildkitd-lazy-probe-"

// Check is one thing looked for on the host.
type Check struct {
	Name     string `json:"name"`
	OK       bool   `json:"ok"`
	Required bool   `json:"required"`      // without it, no build runs at all
	Detail   string `json:"detail"`        // what was seen, one sentence without a full stop
	Fix      string `json:"fix,omitempty"` // how to get what is missing; empty if OK
}

// Report is what the host offers.
type Report struct {
	StateDir string  `json:"stateDir"`
	Checks   []Check `json:"checks"`
}

// Check returns the check of that name; the zero Check, which is not OK, if there is none.
func (r Report) Check(name string) Check {
	for _, c := range r.Checks {
		if c.Name == name {
			return c
		}
	}
	return Check{Name: name}
}

// Missing returns the required checks that failed. Where it returns none, builds run.
func (r Report) Missing() []Check {
	var missing []Check
	for _, c := range r.Checks {
		if c.Required && !c.OK {
			missing = append(missing, c)
		}
	}
	return missing
}

// Door says how lazy layers are served on this host when the configuration asks for mount ("auto", "erofs", "fuse" or "off"; ""
// means "auto"), and in one sentence why. The answer is [DoorOff] also where mount asks for a door that the host does
// not have; the reason says what is missing, and whether builds go on eagerly ("auto") or the daemon does not start
// ("erofs", "fuse").
func (r Report) Door(mount string) (door, reason string) {
	switch mount {
	case "", "auto", DoorEROFS, DoorFUSE:
	case DoorOff:
		return DoorOff, `mount = "off" is configured: layers are pulled and unpacked before they are used`
	default:
		return DoorOff, fmt.Sprintf("mount = %q is not a way to serve lazy layers (auto, erofs, fuse, off): layers are pulled and unpacked before they are used", mount)
	}

	missing := func(names ...string) string {
		var list []string
		for _, name := range names {
			if c := r.Check(name); !c.OK {
				list = append(list, strings.TrimSuffix(name+": "+c.Detail, ": "))
			}
		}
		return strings.Join(list, "; ")
	}
	noKernel, noFUSE := missing(EROFS, PreContent, Overlayfs), missing(FUSE, Overlayfs)
	switch {
	case mount != DoorFUSE && noKernel == "":
		return DoorEROFS, "EROFS with pre-content events and overlayfs mounts work here"
	case mount == DoorEROFS:
		return DoorOff, fmt.Sprintf("%s: the daemon does not start, as mount = %q is configured", noKernel, mount)
	case noFUSE == "" && mount == DoorFUSE:
		return DoorFUSE, "FUSE and overlayfs mounts work here"
	case noFUSE == "":
		return DoorFUSE, "FUSE and overlayfs mounts work here; the kernel can't serve layers: " + missing(EROFS, PreContent)
	case mount == DoorFUSE:
		return DoorOff, fmt.Sprintf("%s: the daemon does not start, as mount = %q is configured", noFUSE, mount)
	default:
		return DoorOff, missing(EROFS, PreContent, FUSE, Overlayfs) + ": layers are pulled and unpacked before they are used"
	}
}
