package daemon

import (
	"debug/buildinfo"
	"fmt"
	"runtime/debug"
	"slices"
)

// SharedVersions compares what two Go binaries were linked from. shared are the modules that both
// have, and the toolchain under the name "go", with the first's versions; differ says which of them the
// second has in another version. A module that only one links is in neither.
func SharedVersions(first, second string) (shared map[string]string, differ []string, err error) {
	a, err := linked(first)
	if err != nil {
		return nil, nil, err
	}
	b, err := linked(second)
	if err != nil {
		return nil, nil, err
	}
	shared = map[string]string{}
	for module, v := range a {
		other, ok := b[module]
		if !ok {
			continue
		}
		shared[module] = v
		if other != v {
			differ = append(differ, fmt.Sprintf("%s %s and %s", module, v, other))
		}
	}
	slices.Sort(differ)
	return shared, differ, nil
}

// linked returns the versions of the modules in a binary. A binary's main module is among
// them if it has a version: that of stock buildkitd is a dependency of the module that builds it.
func linked(binary string) (map[string]string, error) {
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		return nil, fmt.Errorf("read what %s was built from: %w", binary, err)
	}
	out := map[string]string{"go": info.GoVersion}
	for _, m := range append([]*debug.Module{&info.Main}, info.Deps...) {
		for m.Replace != nil {
			m = m.Replace
		}
		if m.Version != "" && m.Version != "(devel)" {
			out[m.Path] = m.Version
		}
	}
	return out, nil
}
