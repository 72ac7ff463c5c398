package exporter

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/estargz"
)

const nameEStargz = "estargz"

// levels are the compression levels, as each library has them.
var levels = map[string]struct{ min, max int }{
	"gzip":      {-2, 9},
	nameEStargz: {-2, 9},
	"zstd":      {0, 22},
}

// The prefixes mark attributes that are ours, and so are ours to refuse.
const (
	lazyPrefix    = "lazy-"
	estargzPrefix = "estargz-"
)

// keyPrioritize names a list of the files that come first in their layers.
const keyPrioritize = "lazy-prioritize"

// The attributes of eStargz layers are sizes in bytes, or with a unit as in 64k or 4MiB.
const (
	keyChunkSize    = "estargz-chunk-size"
	keyMinChunkSize = "estargz-min-chunk-size"
	keyExternalTOC  = "estargz-external-toc" // a boolean

	// leastChunkSize keeps the table of contents smaller than what it's the table of.
	leastChunkSize = 4 << 10
)

// check refuses attributes which no exporter could follow, and fills in what
// follows from the others.
func check(kind string, attrs map[string]string) error {
	layers := writesLayers(kind)
	if err := checkNames(kind+" exporter", layers, attrs); err != nil {
		return err
	}
	if layers {
		return checkLayers(kind, attrs)
	}
	return nil
}

// writesLayers reports whether a type of exporter does.
func writesLayers(kind string) bool {
	return kind == client.ExporterImage || kind == client.ExporterOCI || kind == client.ExporterDocker
}

// compressions are those that an exporter may be asked for.
var compressions = []string{"uncompressed", "gzip", nameEStargz, "zstd", nameZstdChunked}

// checkCompression says which compressions there are, where BuildKit says that it doesn't know one.
func checkCompression(compression string) error {
	if compression == "" || slices.Contains(compressions, compression) {
		return nil
	}
	return fmt.Errorf("compression=%s is unknown: there are %s", compression, strings.Join(compressions, ", "))
}

func checkLayers(kind string, attrs map[string]string) error {
	compression := attrs[string(exptypes.OptKeyLayerCompression)]
	if err := checkCompression(compression); err != nil {
		return err
	}
	if err := checkLevel(compression, attrs); err != nil {
		return err
	}
	if _, err := writeOptions(attrs); err != nil {
		return err
	}
	if err := checkTOC(kind+" exporter", kind == client.ExporterImage, attrs); err != nil {
		return err
	}
	if err := checkList(attrs); err != nil || compression != nameEStargz {
		return err
	}
	key := string(exptypes.OptKeyOCITypes)
	v, given := attrs[key]
	if !given {
		// The docker exporter's default has no place for a layer's annotations.
		attrs[key] = "true"
		return nil
	}
	if oci, err := strconv.ParseBool(v); err == nil && !oci {
		return fmt.Errorf("compression=estargz conflicts with %s=false: Docker's media types have no annotations, and without the one that names its table of contents a layer can't be pulled lazily; leave %s out or choose compression=gzip", key, key)
	}
	return nil
}

// checkCache is check for exporters of caches. It minds the levels of what is written by ours.
func checkCache(name string, attrs map[string]string, chunked bool) error {
	if err := checkNames(name+" cache exporter", true, attrs); err != nil {
		return err
	}
	if err := checkCompression(attrs[string(exptypes.OptKeyLayerCompression)]); err != nil {
		return err
	}
	if isEStargz(attrs) || chunked {
		if err := checkLevel(attrs[string(exptypes.OptKeyLayerCompression)], attrs); err != nil {
			return err
		}
	}
	if _, err := writeOptions(attrs); err != nil {
		return err
	}
	if err := checkTOC(name+" cache exporter", false, attrs); err != nil {
		return err
	}
	return checkList(attrs)
}

// checkList looks whether a list could be used; what is in it is seen when the build is exported.
func checkList(attrs map[string]string) error {
	v, given := attrs[keyPrioritize]
	if !given {
		return nil
	}
	if !isEStargz(attrs) {
		return fmt.Errorf("%s=%s is for compression=estargz only; choose that or leave %s out", keyPrioritize, v, keyPrioritize)
	}
	_, _, err := splitList(v)
	return err
}

// checkNames refuses attributes that look like ours and aren't.
func checkNames(what string, layers bool, attrs map[string]string) error {
	for _, k := range slices.Sorted(maps.Keys(attrs)) {
		switch {
		case strings.HasPrefix(k, lazyPrefix) && (k != keyPrioritize || !layers):
			return fmt.Errorf("unknown attribute %q of the %s: there is %s, for exporters of layers", k, what, keyPrioritize)
		case !strings.HasPrefix(k, estargzPrefix):
		case !layers:
			return fmt.Errorf("unknown attribute %q of the %s, which writes no layers", k, what)
		case k != keyChunkSize && k != keyMinChunkSize && k != keyExternalTOC:
			return fmt.Errorf("unknown attribute %q of the %s: there are %s, %s and %s", k, what, keyChunkSize, keyMinChunkSize, keyExternalTOC)
		}
	}
	return nil
}

// isEStargz reports whether eStargz layers are asked for.
func isEStargz(attrs map[string]string) bool {
	return attrs[string(exptypes.OptKeyLayerCompression)] == nameEStargz
}

// writeOptions are what the attributes say about eStargz layers, but for the level, which BuildKit reads.
func writeOptions(attrs map[string]string) (opt estargz.WriteOptions, err error) {
	for _, a := range []struct {
		key   string
		least int64
		to    *int64
	}{
		{keyChunkSize, leastChunkSize, &opt.ChunkSize},
		{keyMinChunkSize, 0, &opt.MinChunkSize},
	} {
		v, given := attrs[a.key]
		if !given {
			continue
		}
		if !isEStargz(attrs) {
			return opt, fmt.Errorf("%s=%s is for compression=estargz only; choose that or leave %s out", a.key, v, a.key)
		}
		n, err := units.RAMInBytes(v)
		if err != nil {
			return opt, fmt.Errorf("%s=%q is no size: give bytes, or a number with a unit as in 64k or 4MiB", a.key, v)
		}
		if n < a.least || n > estargz.MaxChunkSize {
			return opt, fmt.Errorf("%s=%s is out of range: want %d to %d bytes", a.key, v, a.least, int64(estargz.MaxChunkSize))
		}
		*a.to = max(n, 1) // 0 is no default here: each file by itself, which takes one byte at least
	}
	opt.ExternalTOC, err = boolean(attrs, keyExternalTOC)
	return opt, err
}

// boolean reads an attribute as BuildKit does: one without a value is true.
func boolean(attrs map[string]string, key string) (bool, error) {
	v, given := attrs[key]
	if !given || v == "" {
		return given, nil
	}
	b, err := strconv.ParseBool(v)
	if err != nil {
		return false, fmt.Errorf("%s=%q is neither true nor false", key, v)
	}
	return b, nil
}

// checkTOC looks whether external TOCs have a place to go to.
func checkTOC(what string, image bool, attrs map[string]string) error {
	external, err := boolean(attrs, keyExternalTOC)
	if err != nil || !external {
		return err
	}
	if !isEStargz(attrs) {
		return fmt.Errorf("%s is for compression=estargz only; choose that or leave %s out", keyExternalTOC, keyExternalTOC)
	}
	if !image {
		return fmt.Errorf("%s is for the image exporter only: the tables of contents are an image of their own, which the %s has no place for; push the image, and copy it and NAME:TAG%s from there", keyExternalTOC, what, tocImageSuffix)
	}
	// What isn't a boolean is BuildKit's to refuse.
	if b, err := boolean(attrs, string(exptypes.OptKeyPush)); err == nil && !b {
		return fmt.Errorf("%s needs push=true: the tables of contents are pushed to NAME:TAG%s", keyExternalTOC, tocImageSuffix)
	}
	if b, err := boolean(attrs, string(exptypes.OptKeyPushByDigest)); err == nil && b {
		return fmt.Errorf("%s conflicts with %s: readers find the tables of contents by the image's tag", keyExternalTOC, exptypes.OptKeyPushByDigest)
	}
	return nil
}

func checkLevel(compression string, attrs map[string]string) error {
	key := string(exptypes.OptKeyCompressionLevel)
	v, given := attrs[key]
	if !given {
		return nil
	}
	if compression == "" {
		compression = "gzip"
	}
	if compression == "uncompressed" {
		return fmt.Errorf("%s=%s conflicts with compression=uncompressed: there is nothing to compress; leave one of them out", key, v)
	}
	l := levels[compression]
	n, err := strconv.Atoi(v)
	if err != nil {
		return fmt.Errorf("%s=%q is no number", key, v)
	}
	if n < l.min || n > l.max {
		return fmt.Errorf("%s=%d is out of range: %s has levels %d to %d", key, n, compression, l.min, l.max)
	}
	return nil
}
