package main

import (
	"strings"

	"github.com/urfave/cli/v3"
)

// helpTemplate is the library's, without the sections that say nothing here. The printer aligns what stands on
// either side of a tab.
const helpTemplate = `{{.Name}}: {{.Usage}}

Usage:
   {{wrap .UsageText 3}}

Commands:{{range .VisibleCommands}}
   {{.Name}}{{"\t"}}{{.Usage}}{{end}}
{{range .VisibleFlagCategories}}
{{if .Name}}{{.Name}}{{else}}General{{end}}:
{{range .Flags}}   {{.}}
{{end}}{{end}}
Everything but the lazy flags is stock buildkitd's; docs/configuration.md explains all of it.
`

// shortSlices makes --help show a repeatable flag once.
func shortSlices(stringer cli.FlagStringFunc) cli.FlagStringFunc {
	return func(f cli.Flag) string {
		name, rest, _ := strings.Cut(stringer(f), "\t")
		if _, ok := f.(*cli.StringSliceFlag); ok {
			name, _, _ = strings.Cut(name, " [ ")
		}
		return name + "\t" + rest
	}
}

// commandNames lists the commands, as in "a, b".
func commandNames(c *cli.Command) string {
	var names []string
	for _, sub := range c.Root().VisibleCommands() {
		names = append(names, sub.Name)
	}
	return strings.Join(names, ", ")
}
