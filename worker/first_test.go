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
