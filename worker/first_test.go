package worker

import (
	"testing"

	"github.com/moby/buildkit/solver"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
)

type vertex struct {
	op     *pb.Op
	inputs []solver.Edge
}

func (v *vertex) Digest() digest.Digest         { return "" }
func (v *vertex) Sys() any                      { return v.op }
func (v *vertex) Options() solver.VertexOptions { return solver.VertexOptions{} }
func (v *vertex) Inputs() []solver.Edge         { return v.inputs }
func (v *vertex) Name() string                  { return "" }

func on(op *pb.Op, inputs ...*vertex) *vertex {
	v := &vertex{op: op}
	for _, in := range inputs {
		v.inputs = append(v.inputs, solver.Edge{Vertex: in})
	}
	return v
}

func image(name string) *vertex {
	return on(&pb.Op{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: name}}})
}

func run(root int64, inputs ...*vertex) *vertex {
	return on(&pb.Op{Op: &pb.Op_Exec{Exec: &pb.ExecOp{
		Meta:   &pb.Meta{Args: []string{"make"}},
		Mounts: []*pb.Mount{{Dest: "/cache", Input: 0}, {Dest: "/", Input: root}},
	}}}, inputs...)
}

func files(actions []*pb.FileAction, inputs ...*vertex) *vertex {
	return on(&pb.Op{Op: &pb.Op_File{File: &pb.FileOp{Actions: actions}}}, inputs...)
}

func TestFirstStep(t *testing.T) {
	base, other := image("docker-image://base"), image("docker-image://other")
	mkdir := files([]*pb.FileAction{{Input: 0, SecondaryInput: -1}}, base)
	for name, c := range map[string]struct {
		v    *vertex
		want string
	}{
		"on the image":                 {run(1, other, base), "docker-image://base"},
		"on a directory in it":         {run(1, other, mkdir), "docker-image://base"},
		"on what was copied":           {run(0, files([]*pb.FileAction{{Input: 1, SecondaryInput: 0, Output: 0}}, other, mkdir)), "docker-image://base"},
		"on several actions":           {run(0, files([]*pb.FileAction{{Input: 1, Output: -1}, {Input: 2, SecondaryInput: 0, Output: 0}}, other, mkdir)), "docker-image://base"},
		"on an action in a circle":     {run(0, files([]*pb.FileAction{{Input: 1, Output: 0}}, base)), ""},
		"on nothing":                   {run(-1, base), ""},
		"on an input that isn't there": {run(7, base), ""},
		"on a step":                    {run(0, run(0, base)), ""},
		"on an output of no action":    {run(0, files([]*pb.FileAction{{Input: 0, Output: 3}}, base)), ""},
		"no step":                      {base, ""},
		"no op":                        {on(nil), ""},
	} {
		t.Run(name, func(t *testing.T) {
			meta, src, ok := firstStep(c.v)
			if got := src.GetSource().GetIdentifier(); got != c.want || ok != (c.want != "") {
				t.Errorf("is on %q, want %q", got, c.want)
			}
			if ok && (len(meta.Args) != 1 || meta.Args[0] != "make") {
				t.Errorf("runs %q", meta.Args)
			}
		})
	}
}

func TestCopiedFrom(t *testing.T) {
	base, other := image("docker-image://base"), image("docker-image://other")
	copyOf := func(from int64, c *pb.FileActionCopy) *pb.FileAction {
		return &pb.FileAction{Input: -1, SecondaryInput: from, Action: &pb.FileAction_Copy{Copy: c}}
	}
	mounts := func(list ...*pb.Mount) *vertex {
		return on(&pb.Op{Op: &pb.Op_Exec{Exec: &pb.ExecOp{Mounts: list}}}, other, base)
	}
	root := &pb.Mount{Dest: "/", Input: 0}
	for name, c := range map[string]struct {
		v    *vertex
		want string
	}{
		"a copy":               {files([]*pb.FileAction{copyOf(1, &pb.FileActionCopy{Src: "/usr/share", AllowWildcard: true})}, other, base), "usr/share/"},
		"all of the image":     {files([]*pb.FileAction{copyOf(1, &pb.FileActionCopy{Src: "/"})}, other, base), "/"},
		"a name with a star":   {files([]*pb.FileAction{copyOf(1, &pb.FileActionCopy{Src: "/a*b"})}, other, base), "a*b/"},
		"a pattern":            {files([]*pb.FileAction{copyOf(1, &pb.FileActionCopy{Src: "/a*b", AllowWildcard: true})}, other, base), ""},
		"without some":         {files([]*pb.FileAction{copyOf(1, &pb.FileActionCopy{Src: "/a", ExcludePatterns: []string{"b"}})}, other, base), ""},
		"of another action":    {files([]*pb.FileAction{copyOf(7, &pb.FileActionCopy{Src: "/a"})}, other, base), ""},
		"of a step":            {files([]*pb.FileAction{copyOf(0, &pb.FileActionCopy{Src: "/a"})}, run(0, base)), ""},
		"a mount":              {mounts(root, &pb.Mount{Dest: "/in", Input: 1, Selector: "/opt", Readonly: true}), "opt/"},
		"a mount to scribble":  {mounts(root, &pb.Mount{Dest: "/in", Input: 1, Selector: "/opt", Output: int64(pb.SkipOutput)}), "opt/"},
		"a mount with results": {mounts(root, &pb.Mount{Dest: "/in", Input: 1, Selector: "/opt", Output: 1}), ""},
		"a mount by its name":  {mounts(root, &pb.Mount{Dest: "/in", Input: 1, Readonly: true, ContentCache: pb.MountContentCache_OFF}), ""},
		"the root":             {mounts(&pb.Mount{Dest: "/", Input: 1}), ""},
		"no op":                {on(nil), ""},
	} {
		t.Run(name, func(t *testing.T) {
			got := copiedFrom(c.v)
			if list := got[base.op]; len(got) > 1 || len(list) > 1 || (len(list) > 0) != (c.want != "") || len(list) == 1 && list[0].Paths[0] != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}
