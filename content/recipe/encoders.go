package recipe

import (
	"bytes"
	"compress/flate"
	stdgzip "compress/gzip"
	"crypto/sha256"
	"fmt"
	"io"
	"strconv"
	"sync"

	kgzip "github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/klauspost/pgzip"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
)

// Format is how a blob is compressed.
type Format string

const (
	Plain Format = "" // a tar
	Gzip  Format = "gzip"
	Zstd  Format = "zstd"
)

// Encoder is a compressor with its setting.
type Encoder struct {
	// Name stands in recipes.
	Name   string
	Format Format
	// Open begins to compress into a writer. The caller closes what it returns, after an error too.
	Open func(io.Writer) (io.WriteCloser, error)
	// begins, where it is not nil, makes the same beginning, up to maxBegin of the input, and works in its caller's
	// goroutine.
	begins func(io.Writer) (io.WriteCloser, error)
}

// gzipHead is the length of the gzip header that each encoder here writes.
const gzipHead = 10

// plain writes what it gets.
type plain struct{ io.Writer }

func (plain) Close() error { return nil }

// levels of gzip, the usual ones first.
var levels = []int{6, 1, 9, 5, 4, 3, 2, 7, 8, flate.HuffmanOnly, 0}

// pgzipBlocks are how much of the input pgzip compresses at a time: its default, and what podman sets.
var pgzipBlocks = []int{1 << 20, 256 << 10}

// Encoders returns those of a format, the likely ones first.
func Encoders(f Format) (list []Encoder) {
	switch f {
	case Plain:
		return []Encoder{{Name: "tar", Open: func(w io.Writer) (io.WriteCloser, error) { return plain{w}, nil }}}
	case Zstd:
		return zstdEncoders()
	}
	for _, level := range levels {
		list = append(list, Encoder{Name: name("compress/gzip", level), Format: f,
			Open: func(w io.Writer) (io.WriteCloser, error) { return stdgzip.NewWriterLevel(w, level) }})
	}
	for _, level := range levels {
		klauspost := func(w io.Writer) (io.WriteCloser, error) { return kgzip.NewWriterLevel(w, level) }
		for _, block := range pgzipBlocks {
			open := func(w io.Writer) (io.WriteCloser, error) {
				p, err := pgzip.NewWriterLevel(w, level)
				if err != nil {
					return nil, err
				}
				return p, p.SetConcurrency(block, 2)
			}
			list = append(list, Encoder{Name: fmt.Sprint(name("pgzip", level), " ", block>>10, "k"), Format: f, Open: open,
				begins: klauspost})
		}
		list = append(list, Encoder{Name: name("klauspost/gzip", level), Format: f, Open: klauspost})
	}
	return list
}

func zstdEncoders() (list []Encoder) {
	for _, level := range []zstd.EncoderLevel{
		zstd.SpeedDefault, zstd.SpeedFastest, zstd.SpeedBetterCompression, zstd.SpeedBestCompression,
	} {
		for _, crc := range []bool{true, false} {
			text := name("klauspost/zstd", int(level))
			if !crc {
				text += " no-crc"
			}
			list = append(list, Encoder{Name: text, Format: Zstd, Open: func(w io.Writer) (io.WriteCloser, error) {
				return zstd.NewWriter(w, zstd.WithEncoderLevel(level), zstd.WithEncoderCRC(crc),
					zstd.WithEncoderConcurrency(1))
			}})
		}
	}
	return list
}

func name(library string, level int) string { return library + " " + strconv.Itoa(level) }

// encoderNamed finds an encoder by the name in a recipe.
func encoderNamed(name string) (Encoder, bool) {
	for _, f := range []Format{Plain, Gzip, Zstd} {
		for _, e := range Encoders(f) {
			if e.Name == name {
				return e, true
			}
		}
	}
	return Encoder{}, false
}

// fingerprints are made once for each encoder.
var fingerprints = struct {
	mu   sync.Mutex
	sums map[string]content.Sum
	text []byte
}{sums: map[string]content.Sum{}}

// Fingerprint is the sha256 of what an encoder makes of a text that never changes.
func (e Encoder) Fingerprint() (sum content.Sum, err error) {
	f := &fingerprints
	f.mu.Lock()
	defer f.mu.Unlock()
	if sum, ok := f.sums[e.Name]; ok {
		return sum, nil
	}
	if f.text == nil {
		f.text = fixedText()
	}
	h := sha256.New()
	w, err := e.Open(h)
	if err != nil {
		return sum, err
	}
	_, err = io.Copy(struct{ io.Writer }{w}, struct{ io.Reader }{bytes.NewReader(f.text)})
	if cerr := w.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return sum, fmt.Errorf("fingerprint of %s: %w", e.Name, err)
	}
	sum = content.Sum(h.Sum(nil))
	f.sums[e.Name] = sum
	return sum, nil
}

// fixedText has what files are made of: noise, words, runs, and repetitions near and far. It is longer than a block of
// any encoder. Changing it makes every recipe useless.
func fixedText() []byte {
	const size = 5 << 18 // 1.25 MiB
	out := make([]byte, 0, size+1024)
	state := uint64(0x9e3779b97f4a7c15)
	next := func(n uint64) uint64 { // xorshift64
		state ^= state << 13
		state ^= state >> 7
		state ^= state << 17
		return state % n
	}
	for len(out) < size {
		switch next(8) {
		case 0: // noise
			for range next(600) {
				out = append(out, byte(next(256)))
			}
		case 1: // a run
			out = append(out, bytes.Repeat([]byte{byte(next(256))}, int(next(700)))...)
		case 2, 3: // from far or near before
			if len(out) > 0 {
				from := len(out) - 1 - int(next(uint64(min(len(out), 40_000))))
				out = append(out, out[from:min(len(out), from+int(next(400)))]...)
			}
		default: // words
			for range next(60) {
				word := next(500)
				for range 2 + word%9 {
					out = append(out, 'a'+byte(word%26))
					word = word*7 + 3
				}
				out = append(out, ' ')
			}
		}
	}
	return out[:size]
}
