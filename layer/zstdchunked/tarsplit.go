package zstdchunked

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vbatts/tar-split/tar/storage"

	"github.com/buildkitd-lazy/buildkitd-lazy/layer/frames"
	"github.com/buildkitd-lazy/buildkitd-lazy/layer/zstd"
)

// A tarSplit is all of a tar that isn't the content of files, in JSON: with it, Podman makes the tar again out of the files, and so compares
// with the DiffID what it has fetched by the TOC. As https://github.com/vbatts/tar-split has it, there is a segment of bytes in front of each
// entry, with the padding of the last one and the headers of the next, and behind it the file, with its CRC.
type tarSplit struct {
	packed []byte // frames, of pieces
	piece  []byte // of the JSON, that is to be one
	packer storage.Packer
	size   int64 // of the JSON

	segment []byte
	crc     uint64 // of the file with several chunks that is at hand
	name    string
	total   int64
	// twice is the first name that has come a second time: there is no such thing then.
	twice string
}

// maxSegment is more than headers can be, so that one that is longer is behind the end of the tar.
const maxSegment = 4 << 20

// pieceSize is how much of the JSON is compressed at once: headers resemble their neighbours, and all that are written beside each other have
// one in memory.
const pieceSize = 512 << 10

func newTarSplit() *tarSplit {
	s := &tarSplit{}
	s.packer = storage.NewJSONPacker(s)
	return s
}

// Write implements io.Writer, for the packer.
func (s *tarSplit) Write(p []byte) (int, error) {
	s.size += int64(len(p))
	if s.piece = append(s.piece, p...); len(s.piece) >= pieceSize {
		s.pack()
	}
	return len(p), nil
}

// pack compresses the piece at hand.
func (s *tarSplit) pack() {
	s.packed = zstd.Append(s.packed, s.piece)
	s.piece = s.piece[:0]
}

// add adds a frame.
func (s *tarSplit) add(fr *frames.Frame) error {
	if s.twice != "" {
		return nil
	}
	done := 0
	for i := range fr.Records {
		r := &fr.Records[i]
		s.segment = append(s.segment, fr.Tar[done:r.Start]...)
		done = r.Start + r.Size
		switch r.Part {
		case frames.Whole:
			if err := s.file(r.TOC.Name, int64(r.Size), r.CRC); err != nil {
				return err
			}
		case frames.FirstPart:
			if err := s.flush(); err != nil {
				return err
			}
			s.name, s.total, s.crc = r.TOC.Name, r.TOC.Size, 0
			fallthrough
		default:
			s.crc = crc(s.crc, r.Payload(fr))
			if r.Part == frames.LastPart {
				if err := s.file(s.name, s.total, s.crc); err != nil {
					return err
				}
			}
		}
	}
	s.segment = append(s.segment, fr.Tar[done:]...)
	if len(s.segment) > maxSegment {
		return s.flush()
	}
	return nil
}

// file adds a file, of any type, and what is in front of it.
func (s *tarSplit) file(name string, size int64, sum uint64) error {
	if err := s.flush(); err != nil {
		return err
	}
	e := storage.Entry{Type: storage.FileType, Size: size}
	if size > 0 {
		e.Payload = binary.BigEndian.AppendUint64(nil, sum)
	}
	e.SetName(name)
	_, err := s.packer.AddEntry(e)
	if errors.Is(err, storage.ErrDuplicatePath) {
		s.twice = name
		return nil
	}
	return wrap(err)
}

// flush adds the segment at hand.
func (s *tarSplit) flush() error {
	if len(s.segment) == 0 {
		return nil
	}
	_, err := s.packer.AddEntry(storage.Entry{Type: storage.SegmentType, Payload: s.segment})
	s.segment = s.segment[:0]
	return wrap(err)
}

func wrap(err error) error {
	if err != nil {
		return fmt.Errorf("headers of the tar: %w", err)
	}
	return nil
}

// finish returns all of it, compressed.
func (s *tarSplit) finish() ([]byte, error) {
	if err := s.flush(); err != nil {
		return nil, err
	}
	s.pack()
	return s.packed, nil
}
