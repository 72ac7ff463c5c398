package exporter

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
)

// levels are the compression levels, as each library has them.
var levels = map[string]struct{ min, max int }{
	"gzip":    {-2, 9},
	"estargz": {-2, 9},
	"zstd":    {0, 22},
}

// lazyPrefix marks attributes that are ours. None is known yet.
const lazyPrefix = "lazy-"

// check refuses attributes which no exporter could follow, and fills in what
// follows from the others.
func check(kind string, attrs map[string]string) error {
	for _, k := range slices.Sorted(maps.Keys(attrs)) {
		if strings.HasPrefix(k, lazyPrefix) {
			return fmt.Errorf("unknown attribute %q of the %s exporter: this version has no %s* attributes", k, kind, lazyPrefix)
		}
	}
	switch kind {
	case client.ExporterImage, client.ExporterOCI, client.ExporterDocker:
		return checkLayers(attrs)
	}
	return nil
}

func checkLayers(attrs map[string]string) error {
	compression := attrs[string(exptypes.OptKeyLayerCompression)]
	if err := checkLevel(compression, attrs); err != nil {
		return err
	}
	if compression != "estargz" {
		return nil
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
	l, known := levels[compression]
	if !known {
		return nil // the exporter names the compressions there are
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		return fmt.Errorf("%s=%q is no number", key, v)
	}
	if n < l.min || n > l.max {
		return fmt.Errorf("%s=%d is out of range: %s has levels %d to %d", key, n, compression, l.min, l.max)
	}
	return nil
}
