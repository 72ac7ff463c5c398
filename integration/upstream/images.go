package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// imagesVersion is part of the key under which results of the stock daemon
// are kept. Count it up when the images below change.
const imagesVersion = 4

// foreignPort is where the foreign layer of cpuguy83/buildkit-foreign is
// served in every sandbox: its manifest has to name an address.
const foreignPort = 7413

// epoch is the time of every file in the images. Tests expect images to be
// older than the day they run, and to have a time at all.
var epoch = time.Date(2024, time.March, 4, 5, 6, 7, 0, time.UTC)

// scan stands in for BuildKit's default SBOM scanner.
const scan = `cat <<EOF > $BUILDKIT_SCAN_DESTINATION/spdx.json
{"_type": "https://in-toto.io/Statement/v1", "predicateType": "https://spdx.dev/Document", "predicate": {"name": "scan", "spdxVersion": "SPDX-2.3", "SPDXID": "SPDXRef-DOCUMENT"}}
EOF
`

// adduser is what busybox-static leaves out.
const adduser = `#!/bin/sh
uid=1000
while getopts DHu:h:s:G:g: o; do
	case $o in u) uid=$OPTARG ;; h) home=$OPTARG ;; esac
done
shift $((OPTIND - 1))
home=${home:-/home/$1}
while grep -q "^[^:]*:[^:]*:$uid:" /etc/passwd; do uid=$((uid + 1)); done
echo "$1:x:$uid:$uid::$home:/bin/sh" >> /etc/passwd
echo "$1:x:$uid:" >> /etc/group
mkdir -p "$home" && chown "$uid:$uid" "$home"
`

// mirror fills a directory with the images that the tests expect at
// docker.io, so that they run offline. All are made of the machine's static
// busybox. Those that the tests know by digest, or use apk, apt or bash from,
// get something that at least starts.
type mirror struct {
	dir     string // BUILDKIT_REGISTRY_MIRROR_DIR
	estargz bool   // compress layers as eStargz
}

// build makes the images anew. registry is the binary that stores them.
func (m mirror) build(ctx context.Context, registry string) (err error) {
	if err := os.RemoveAll(m.dir); err != nil {
		return err
	}
	if err := os.MkdirAll(m.dir, 0o755); err != nil {
		return err
	}
	// The tests start a registry on the same directory with a configuration
	// of their own making, below another path: this one goes away again.
	conf := filepath.Join(m.dir, "build.yaml")
	addr, err := freeAddr(ctx)
	if err != nil {
		return err
	}
	yaml := fmt.Sprintf("version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %q}}\nhttp: {addr: %q}\nvalidation: {manifests: {urls: {allow: [\"^http:\"]}}}\n", filepath.Join(m.dir, "data"), addr)
	if err := os.WriteFile(conf, []byte(yaml), 0o600); err != nil {
		return err
	}
	defer os.Remove(conf)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var log bytes.Buffer
	cmd := exec.CommandContext(ctx, registry, "serve", conf)
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start registry: %w", err)
	}
	defer func() {
		cancel(errors.New("images are made"))
		_ = cmd.Wait()
		if err != nil && log.Len() > 0 {
			err = fmt.Errorf("%w; registry says: %s", err, tail(log.String(), 1000))
		}
	}()
	if err := waitHTTP(ctx, "http://"+addr+"/v2/"); err != nil {
		return err
	}

	busybox, err := m.userland("/bin/busybox", false)
	if err != nil {
		return err
	}
	alpine, err := m.userland("/bin/busybox", true)
	if err != nil {
		return err
	}
	foreign, err := m.foreign()
	if err != nil {
		return err
	}
	bbImage, err := image([]string{"sh"}, "busybox", busybox)
	if err != nil {
		return err
	}
	alpineImage, err := image([]string{"/bin/sh"}, "alpine", alpine)
	if err != nil {
		return err
	}
	nolayers, err := image(nil, "nolayers")
	if err != nil {
		return err
	}
	foreignImage, err := image([]string{"sh"}, "foreign", foreign...)
	if err != nil {
		return err
	}
	scanner, err := image([]string{"/bin/sh", "-c", scan}, "scanner", busybox)
	if err != nil {
		return err
	}
	for ref, img := range map[string]v1.Image{
		"library/busybox:latest":                bbImage,
		"library/busybox:stable":                bbImage,
		"library/busybox:stable-musl":           bbImage,
		"library/busybox:1.34.1-uclibc":         bbImage,
		"library/busybox_amd64:latest":          bbImage,
		"library/alpine:latest":                 alpineImage,
		"library/debian:bullseye-slim":          alpineImage,
		"amd64/debian:bullseye-20230109-slim":   alpineImage,
		"docker/buildkit-syft-scanner:stable-1": scanner,
		"tonistiigi/hellofs:latest":             bbImage,
		"tonistiigi/test:nolayers":              nolayers,
		"cpuguy83/buildkit-foreign:latest":      foreignImage,
	} {
		r, err := name.ParseReference(addr + "/" + ref)
		if err != nil {
			return err
		}
		if err := remote.Write(r, img, remote.WithContext(ctx)); err != nil {
			return fmt.Errorf("store %s: %w", ref, err)
		}
	}
	return nil
}

// layer is one image layer and what the manifest says about it.
type layer struct {
	v1.Layer
	annotations map[string]string
	urls        []string
	mediaType   types.MediaType
}

func image(cmd []string, comment string, layers ...layer) (v1.Image, error) {
	img := mutate.MediaType(empty.Image, types.DockerManifestSchema2)
	img = mutate.ConfigMediaType(img, types.DockerConfigJSON)
	for _, l := range layers {
		var err error
		img, err = mutate.Append(img, mutate.Addendum{
			Layer:       l.Layer,
			Annotations: l.annotations,
			URLs:        l.urls,
			MediaType:   l.mediaType,
			History:     v1.History{Created: v1.Time{Time: epoch}, CreatedBy: "ADD " + comment + " /"},
		})
		if err != nil {
			return nil, err
		}
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cf = cf.DeepCopy()
	cf.Created = v1.Time{Time: epoch}
	cf.OS, cf.Architecture = "linux", "amd64"
	cf.Config.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	if cmd != nil {
		cf.Config.Cmd = cmd
		cf.History = append(cf.History, v1.History{Created: v1.Time{Time: epoch.Add(time.Second)}, CreatedBy: fmt.Sprintf("CMD %q", cmd), EmptyLayer: true})
	}
	return mutate.ConfigFile(img, cf)
}

// userland is a small system made of busybox: with hard links in /bin, as in
// the busybox image, or with symlinks there and in /sbin and /usr, as in
// alpine.
func (m mirror) userland(busybox string, alpine bool) (layer, error) {
	bin, err := os.ReadFile(busybox)
	if err != nil {
		return layer{}, fmt.Errorf("%w; apt-get install busybox-static", err)
	}
	out, err := exec.CommandContext(context.Background(), busybox, "--list-full").Output()
	if err != nil {
		return layer{}, fmt.Errorf("list the applets of %s: %w", busybox, err)
	}
	applets := strings.Fields(string(out))
	slices.Sort(applets)

	var b tarball
	dirs := []string{"bin", "dev", "etc", "home", "lib", "usr", "usr/bin", "usr/sbin", "var", "var/spool", "var/spool/mail", "var/www"}
	if alpine {
		dirs = append(dirs, "media", "mnt", "opt", "proc", "run", "sbin", "srv", "sys", "usr/lib", "usr/local", "usr/local/bin", "var/cache", "var/lib")
	}
	for _, d := range dirs {
		b.dir(d, 0o755)
	}
	b.dir("root", 0o700)
	b.dir("tmp", 0o1777)
	b.dir("var/tmp", 0o1777)
	b.file("bin/busybox", 0o755, bin)
	if alpine {
		for _, a := range applets {
			if a != "bin/busybox" && a != "sbin/busybox" && a != "usr/bin/busybox" {
				b.symlink(a, "/bin/busybox")
			}
		}
		b.file("sbin/apk", 0o755, []byte("#!/bin/sh\necho 'this image cannot install packages' >&2\nexit 1\n"))
		b.file("etc/alpine-release", 0o644, []byte("3.23.0\n"))
		b.file("etc/os-release", 0o644, []byte("NAME=\"Alpine Linux\"\nID=alpine\nVERSION_ID=3.23.0\nPRETTY_NAME=\"Alpine Linux v3.23\"\n"))
	} else {
		seen := map[string]bool{"busybox": true}
		for _, a := range applets {
			if n := filepath.Base(a); !seen[n] {
				seen[n] = true
				b.hardlink("bin/"+n, "bin/busybox")
			}
		}
		b.symlink("usr/bin/env", "../../bin/env")
	}
	b.file("usr/sbin/adduser", 0o755, []byte(adduser))
	if !alpine {
		b.file("etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\nbin:x:2:2:bin:/bin:/bin/false\nsys:x:3:3:sys:/dev:/bin/false\nmail:x:8:8:mail:/var/spool/mail:/bin/false\nwww-data:x:33:33:www-data:/var/www:/bin/false\noperator:x:37:37:Operator:/var:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n"))
		b.file("etc/group", 0o644, []byte("root:x:0:\ndaemon:x:1:\nbin:x:2:\nsys:x:3:\nadm:x:4:\ntty:x:5:\ndisk:x:6:\nmail:x:8:\nwheel:x:10:root\nwww-data:x:33:\noperator:x:37:\nusers:x:100:\nnobody:x:65534:\n"))
		b.file("etc/shadow", 0o600, []byte("root:*::0:99999:7:::\ndaemon:*::0:99999:7:::\nnobody:*::0:99999:7:::\n"))
		return m.layer(&b)
	}
	b.file("etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\nbin:x:1:1:bin:/bin:/sbin/nologin\ndaemon:x:2:2:daemon:/sbin:/sbin/nologin\nmail:x:8:12:mail:/var/mail:/sbin/nologin\nwww-data:x:33:33:www-data:/var/www:/bin/false\noperator:x:37:37:Operator:/var:/bin/false\nnobody:x:65534:65534:nobody:/:/sbin/nologin\n"))
	b.file("etc/group", 0o644, []byte("root:x:0:root\nbin:x:1:root,bin,daemon\ndaemon:x:2:root,bin,daemon\nsys:x:3:root,bin\nadm:x:4:root,daemon\ntty:x:5:\ndisk:x:6:root\nwheel:x:10:root\nmail:x:12:mail\nwww-data:x:33:\noperator:x:37:\nusers:x:100:\nnogroup:x:65533:\nnobody:x:65534:\n"))
	b.file("etc/shadow", 0o640, []byte("root:*::0:::::\nbin:!::0:::::\ndaemon:!::0:::::\nnobody:!::0:::::\n"))
	b.file("etc/hosts", 0o644, []byte("127.0.0.1\tlocalhost\n"))
	b.file("etc/profile", 0o644, []byte("export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"))
	return m.layer(&b)
}

// foreign makes the two uncompressed layers of cpuguy83/buildkit-foreign. The
// manifest says of the first where else its bytes are to be had.
func (m mirror) foreign() ([]layer, error) {
	var layers []layer
	for i, mt := range []types.MediaType{images.MediaTypeDockerSchema2LayerForeign, images.MediaTypeDockerSchema2Layer} {
		var b tarball
		b.dir("foreign", 0o755)
		b.file(fmt.Sprintf("foreign/%d", i), 0o644, []byte("served by somebody else\n"))
		raw, err := b.bytes()
		if err != nil {
			return nil, err
		}
		l, err := layerOf(raw, raw, mt)
		if err != nil {
			return nil, err
		}
		layers = append(layers, layer{Layer: l, mediaType: mt})
		if i == 0 {
			layers[0].urls = []string{fmt.Sprintf("http://127.0.0.1:%d/layer", foreignPort)}
			if err := os.WriteFile(m.foreignFile(), raw, 0o644); err != nil { //nolint:gosec // public test data
				return nil, err
			}
		}
	}
	return layers, nil
}

func (m mirror) foreignFile() string { return filepath.Join(m.dir, "foreign.tar") }

func (m mirror) layer(b *tarball) (layer, error) {
	raw, err := b.bytes()
	if err != nil {
		return layer{}, err
	}
	if !m.estargz {
		var z bytes.Buffer
		w := gzip.NewWriter(&z)
		if _, err := w.Write(raw); err != nil {
			return layer{}, err
		}
		if err := w.Close(); err != nil {
			return layer{}, err
		}
		l, err := layerOf(z.Bytes(), raw, types.DockerLayer)
		return layer{Layer: l, mediaType: types.DockerLayer}, err
	}
	blob, err := estargz.Build(io.NewSectionReader(bytes.NewReader(raw), 0, int64(len(raw))))
	if err != nil {
		return layer{}, fmt.Errorf("build eStargz: %w", err)
	}
	defer blob.Close()
	z, err := io.ReadAll(blob)
	if err != nil {
		return layer{}, err
	}
	zr, err := gzip.NewReader(bytes.NewReader(z))
	if err != nil {
		return layer{}, err
	}
	plain, err := io.ReadAll(zr)
	if err != nil {
		return layer{}, err
	}
	l, err := layerOf(z, plain, types.DockerLayer)
	return layer{
		Layer:     l,
		mediaType: types.DockerLayer,
		annotations: map[string]string{
			estargz.TOCJSONDigestAnnotation:         blob.TOCDigest().String(),
			estargz.StoreUncompressedSizeAnnotation: fmt.Sprint(len(plain)),
		},
	}, err
}

// blobLayer is a compressed layer whose diffID is known.
type blobLayer struct {
	v1.Layer
	diffID v1.Hash
}

func (l blobLayer) DiffID() (v1.Hash, error) { return l.diffID, nil }

func layerOf(compressed, raw []byte, mt types.MediaType) (v1.Layer, error) {
	diffID, _, err := v1.SHA256(bytes.NewReader(raw))
	if err != nil {
		return nil, err
	}
	return blobLayer{static.NewLayer(compressed, mt), diffID}, nil
}

// tarball collects entries; the first error sticks.
type tarball struct {
	buf bytes.Buffer
	tw  *tar.Writer
	err error
}

func (b *tarball) add(h tar.Header, content []byte) {
	if b.tw == nil {
		b.tw = tar.NewWriter(&b.buf)
	}
	if b.err != nil {
		return
	}
	h.ModTime = epoch
	h.Size = int64(len(content))
	if b.err = b.tw.WriteHeader(&h); b.err == nil {
		_, b.err = b.tw.Write(content)
	}
}

func (b *tarball) dir(name string, mode int64) {
	b.add(tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode}, nil)
}

func (b *tarball) file(name string, mode int64, content []byte) {
	b.add(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode}, content)
}

func (b *tarball) symlink(name, target string) {
	b.add(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, nil)
}

func (b *tarball) hardlink(name, target string) {
	b.add(tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o755}, nil)
}

func (b *tarball) bytes() ([]byte, error) {
	if b.err == nil && b.tw != nil {
		b.err = b.tw.Close()
	}
	return b.buf.Bytes(), b.err
}

func freeAddr(ctx context.Context) (string, error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

func waitHTTP(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 20*time.Second, fmt.Errorf("no answer from %s within 20 s", url))
	defer cancel()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err == nil {
			resp.Body.Close()
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// serveForeign serves file on foreignPort until ctx ends.
func serveForeign(ctx context.Context, file string) error {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", foreignPort))
	if err != nil {
		return err
	}
	srv := &http.Server{
		ReadHeaderTimeout: 10 * time.Second,
		Handler:           http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, file) }),
	}
	go srv.Serve(l) //nolint:errcheck // ends with the sandbox
	return nil
}
