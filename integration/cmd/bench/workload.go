package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// started is what the first RUN prints before anything else. Its shell and libc have been
// read from the base image by then.
const started = "bench: the command runs"

// A workload is a build. Its last stage holds nothing but a small result, which is exported and looked at.
type workload struct {
	name  string
	title string
	bases []string // base images that have what it needs
	// files are the build context. Results are made in a directory of their own: to copy a file from the
	// root directory BuildKit walks the whole image, which would measure something else. In the Dockerfile BASE stands for the image and
	// START for the command that prints started.
	files map[string]string
	// verify returns what came out; it must be the same for all contestants.
	verify func(ctx context.Context, out string) (string, error)
}

// Phases of a workload: what is measured after its cold build, in this order.
const (
	again   = "again"
	restart = "restart"
	// local is the build with everything on the local disk, which the limit is computed from.
	local = "local"
)

// filled is measured apart from cold builds: a workload with everything on the local disk, by ours and by those that unpack.
const filled = "filled"

// localBy and bytesBy are the contestants whose local build and whose bytes make the limit.
const (
	localBy = "overlayfs-zstd"
	bytesBy = "stargz-tuned"
)

var phaseTitles = map[string]string{
	again:   "the same build again",
	restart: "the same build after the daemon restarted",
	filled:  "with everything on the local disk, page cache dropped",
}

// principal is the workload of a base image that again and restart follow.
var principal = map[string]string{"debian": "c", "go": "go"}

// largeDir is what the workload copyfrom copies: 12k files, 138 MB.
const largeDir = "/usr/local/go/src"

var workloads = []workload{
	{
		name: "c", title: "C hello, static", bases: []string{"debian"},
		files: map[string]string{
			"Dockerfile": `FROM BASE AS build
WORKDIR /src
COPY hello.c .
RUN START && gcc -O2 -Wall -static -o hello hello.c
FROM scratch
COPY --from=build /src/hello /
`,
			"hello.c": "#include <stdio.h>\n\nint main(void) { puts(\"hello from C\"); }\n",
		},
		verify: prints("hello"),
	},
	{
		name: "go", title: "Go program with net/http", bases: []string{"go", "debian"},
		files: map[string]string{
			"Dockerfile": `FROM BASE AS build
WORKDIR /src
COPY go.mod main.go ./
RUN START && CGO_ENABLED=0 go build -o hello .
FROM scratch
COPY --from=build /src/hello /
`,
			"go.mod": "module hello\n\ngo 1.24\n",
			"main.go": `package main

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
)

func main() {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "hello from Go")
	}))
	defer s.Close()
	resp, err := http.Get(s.URL)
	if err != nil {
		log.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Print(string(body))
}
`,
		},
		verify: prints("hello"),
	},
	{
		name: "python", title: "Python importing numpy", bases: []string{"debian"},
		files: map[string]string{
			"Dockerfile": `FROM BASE AS run
WORKDIR /src
COPY main.py .
RUN START && python3 main.py > result
FROM scratch
COPY --from=run /src/result /
`,
			"main.py": "import numpy\n\na = numpy.arange(9).reshape(3, 3)\nprint(int(numpy.linalg.matrix_rank(a)), a.sum())\n",
		},
		verify: content("result"),
	},
	{
		name: "java", title: "javac hello, and run it", bases: []string{"debian"},
		files: map[string]string{
			"Dockerfile": `FROM BASE AS build
WORKDIR /src
COPY Hello.java .
RUN START && javac Hello.java && java Hello > result
FROM scratch
COPY --from=build /src/result /
`,
			"Hello.java": `public class Hello {
    public static void main(String[] args) {
        System.out.println("hello from Java");
    }
}
`,
		},
		verify: content("result"),
	},
	{
		name: "readall", title: "a step that reads every file (tar c | wc -c)", bases: []string{"go", "debian"},
		files: map[string]string{
			// What BuildKit mounts or writes for the step is left out, so that the sum is that of the image.
			"Dockerfile": `FROM BASE AS read
WORKDIR /src
RUN START && cd / && tar c $(ls | grep -vxE 'proc|sys|dev|etc|run|src|tmp') | wc -c > src/bytes
FROM scratch
COPY --from=read /src/bytes /
`,
		},
		verify: content("bytes"),
	},
	{
		name: "find", title: "a step that looks at every file (find)", bases: []string{"go", "debian"},
		files: map[string]string{
			// To know a size takes a stat.
			"Dockerfile": `FROM BASE AS look
WORKDIR /src
RUN START && find / -xdev -size -99999999k | wc -l > files
FROM scratch
COPY --from=look /src/files /
`,
		},
		verify: content("files"),
	},
	{
		name: "copyfrom", title: "COPY --from of " + largeDir, bases: []string{"go", "debian"},
		files: map[string]string{
			"Dockerfile": `FROM BASE AS base
FROM scratch AS copy
COPY --from=base ` + largeDir + ` /src
FROM scratch
COPY --from=copy /src/go.mod /
`,
		},
		verify: content("go.mod"),
	},
}

// on reports whether the workload can be built on the base image.
func (w workload) on(base string) bool { return slices.Contains(w.bases, base) }

// write writes the build context for a base image to dir.
func (w workload) write(dir, baseRef string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for name, text := range w.files {
		if name == "Dockerfile" {
			text = strings.NewReplacer("FROM BASE", "FROM "+baseRef, "START", "echo '"+started+"'").Replace(text)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// prints verifies a program by running it.
func prints(name string) func(context.Context, string) (string, error) {
	return func(ctx context.Context, out string) (string, error) {
		said, err := exec.CommandContext(ctx, filepath.Join(out, name)).CombinedOutput()
		if err != nil {
			return "", fmt.Errorf("run what was built: %w: %s", err, bytes.TrimSpace(said))
		}
		return string(said), nil
	}
}

// content verifies a file by what is in it.
func content(name string) func(context.Context, string) (string, error) {
	return func(_ context.Context, out string) (string, error) {
		raw, err := os.ReadFile(filepath.Join(out, name))
		return string(raw), err
	}
}
