package archive

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

func gzipped(t testing.TB, data []byte) []byte {
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func zstded(t testing.TB, data []byte, opts ...zstd.EOption) []byte {
	var buf bytes.Buffer
	w, err := zstd.NewWriter(&buf, opts...)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// skippable is a zstd frame that decoders pass over.
func skippable(data string) []byte {
	b := binary.LittleEndian.AppendUint32(nil, 0x184d2a5e)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// decompress reads a blob with the Go library and, where it is installed, with igzip, which has to
// agree on the bytes and on whether the blob is good.
func decompress(blob io.Reader) ([]byte, error) {
	var seen bytes.Buffer
	data, err := decompressBy("", io.TeeReader(blob, &seen))
	if path, lerr := exec.LookPath("igzip"); lerr == nil && !isSourceError(err) {
		rest, _ := io.ReadAll(blob)
		other, oerr := decompressBy(path, io.MultiReader(bytes.NewReader(seen.Bytes()), bytes.NewReader(rest)))
		if (err == nil) != (oerr == nil) || errors.Is(err, ErrInvalid) != errors.Is(oerr, ErrInvalid) {
			return data, errors.Join(err, fmt.Errorf("igzip disagrees: %w", oerr))
		}
		if err == nil && !bytes.Equal(data, other) {
			return data, errors.New("igzip gives other bytes")
		}
		seen.Write(rest)
		if file, ferr := decompressFile(path, seen.Bytes()); !bytes.Equal(file, other) || (oerr == nil) != (ferr == nil) {
			return data, fmt.Errorf("igzip gives %d bytes and %v from a pipe, %d and %v from a file", len(other), oerr,
				len(file), ferr)
		}
	}
	return data, err
}

// decompressFile puts the blob into a file, behind something that is not of it.
func decompressFile(igzipPath string, blob []byte) (_ []byte, err error) {
	f, err := os.CreateTemp("", "blob-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	if _, err := f.Write(append([]byte("before"), blob...)); err != nil {
		return nil, err
	}
	if _, err := f.Seek(int64(len("before")), io.SeekStart); err != nil {
		return nil, err
	}
	return decompressBy(igzipPath, f)
}

func isSourceError(err error) bool { return err != nil && !errors.Is(err, ErrInvalid) }

func decompressBy(igzipPath string, blob io.Reader) ([]byte, error) {
	r, err := decompressWith(igzipPath, blob, nil)
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(r)
	return data, errors.Join(err, r.Close())
}

// noise does not compress, so that every byte of a blob matters.
func noise(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func TestDecompress(t *testing.T) {
	data := append(noise(300_000), bytes.Repeat([]byte("text"), 100_000)...)
	half := len(data) / 2
	for name, blob := range map[string][]byte{
		"plain":              data,
		"gzip":               gzipped(t, data),
		"gzip multi-member":  append(gzipped(t, data[:half]), gzipped(t, data[half:])...),
		"gzip empty members": append(append(gzipped(t, nil), gzipped(t, data)...), gzipped(t, nil)...),
		"zstd":               zstded(t, data),
		"zstd frames":        append(zstded(t, data[:half]), zstded(t, data[half:])...),
		"zstd:chunked":       append(append(skippable("first"), zstded(t, data)...), skippable("manifest")...),
		"zstd 128 MiB":       zstded(t, data, zstd.WithWindowSize(128<<20), zstd.WithSingleSegment(false)),
		"zstd 256 MiB":       withWindow(zstded(t, data, zstd.WithWindowSize(8<<20), zstd.WithSingleSegment(false)), 256<<20),
		"zstd 512 MiB":       withWindow(zstded(t, data, zstd.WithWindowSize(8<<20), zstd.WithSingleSegment(false)), 512<<20),
	} {
		t.Run(name, func(t *testing.T) {
			got, err := decompress(iotest.HalfReader(bytes.NewReader(blob)))
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("got %d of %d bytes, %v", len(got), len(data), err)
			}
		})
	}
	for _, short := range []string{"", "\x1f", "\x1f\x8b", "abc"} {
		if got, err := decompress(strings.NewReader(short)); err != nil || string(got) != short {
			t.Errorf("%q became %q, %v", short, got, err)
		}
	}
}

func TestBadBlobs(t *testing.T) {
	data := noise(100_000)
	gz, zs := gzipped(t, data), zstded(t, data)
	flip := func(blob []byte, at int) []byte {
		blob = bytes.Clone(blob)
		blob[at] ^= 0xff
		return blob
	}
	zsWindow := zstded(t, data, zstd.WithWindowSize(8<<20), zstd.WithSingleSegment(false))
	zsSegment := zstded(t, data, zstd.WithSingleSegment(true))
	for name, row := range map[string]struct {
		blob []byte
		says string
	}{
		"gzip cut in header":  {gz[:5], "gzip: blob is truncated after 0"},
		"gzip cut":            {gz[:50_000], "gzip: blob is truncated after "},
		"gzip cut in trailer": {gz[:len(gz)-3], "gzip: blob is truncated after 100000"},
		"gzip checksum":       {flip(gz, len(gz)-6), "gzip: blob is corrupt after 100000"},
		"gzip flags":          {flip(gz, 3), "gzip: blob is"},
		"gzip then garbage":   {append(bytes.Clone(gz), "garbage garbage"...), "gzip: blob is corrupt after 100000"},
		"zstd cut":            {zs[:50_000], "zstd: blob is truncated after "},
		"zstd cut in header":  {zs[:5], "zstd: blob is truncated after 0"},
		"zstd checksum":       {flip(zs, len(zs)-1), "zstd: blob is corrupt after "},
		"zstd then garbage":   {append(bytes.Clone(zs), "garbage"...), "zstd: blob is corrupt after 100000"},
		"zstd window":         {withWindow(zsWindow, 1<<30), "window over 512 MiB"},
		"zstd window 2 GiB":   {withWindow(zsWindow, 2<<30), "window over 512 MiB"},
		"zstd one segment":    {withContentSize(zsSegment, 1<<29+1), "window over 512 MiB"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := decompress(bytes.NewReader(row.blob))
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), row.says) {
				t.Errorf("want an ErrInvalid that says %q, got %v", row.says, err)
			}
		})
	}
}

// TestSourceErrors: a failing source is not a corrupt blob.
func TestSourceErrors(t *testing.T) {
	broken := errors.New("connection reset")
	data := noise(1_000_000)
	for name, blob := range map[string][]byte{"plain": data, "gzip": gzipped(t, data), "zstd": zstded(t, data)} {
		for _, n := range []int{0, 500_000} {
			_, err := decompress(io.MultiReader(bytes.NewReader(blob[:n]), iotest.ErrReader(broken)))
			if !errors.Is(err, broken) || errors.Is(err, ErrInvalid) {
				t.Errorf("%s after %d bytes: %v", name, n, err)
			}
		}
	}
}

// TestErrorsStay: who reads on after an error must not meet a clean end.
func TestErrorsStay(t *testing.T) {
	gz := gzipped(t, noise(300_000))
	for name, path := range decompressors() {
		r, err := decompressWith(path, bytes.NewReader(gz[:len(gz)/2]), nil)
		must(t, err)
		for range 2 {
			if _, err := io.Copy(io.Discard, r); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%s: %v", name, err)
			}
		}
		must(t, r.Close())
	}
}

// TestKilledIgzip: a process that was killed does not make the blob bad.
func TestKilledIgzip(t *testing.T) {
	path := decompressors()["igzip"]
	if path == "" {
		t.Skip("needs igzip (Debian package isal)")
	}
	r, err := decompressWith(path, bytes.NewReader(gzipped(t, noise(10_000_000))), nil)
	must(t, err)
	defer r.Close()
	_, err = io.ReadFull(r, make([]byte, 1000))
	must(t, err)
	must(t, r.(*decoder).r.(*igzip).cmd.Process.Kill())
	if _, err := io.Copy(io.Discard, r); err == nil || errors.Is(err, ErrInvalid) {
		t.Errorf("got %v", err)
	}
}

// decompressors are the paths for decompressWith by name.
func decompressors() map[string]string {
	all := map[string]string{"library": ""}
	if path, err := exec.LookPath("igzip"); err == nil {
		all["igzip"] = path
	}
	return all
}

func TestReadAfterClose(t *testing.T) {
	for name, blob := range map[string][]byte{"plain": []byte("data"), "gzip": gzipped(t, []byte("data")),
		"zstd": zstded(t, []byte("data"))} {
		r, err := Decompress(bytes.NewReader(blob), nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(r.Close(), r.Close()); err != nil {
			t.Errorf("%s: close: %v", name, err)
		}
		if _, err := r.Read(make([]byte, 1)); err == nil || err == io.EOF {
			t.Errorf("%s: read after close: %v", name, err)
		}
	}
}

func TestKnownMediaType(t *testing.T) {
	for mt, want := range map[string]bool{
		"application/vnd.oci.image.layer.v1.tar+zstd":                  true,
		"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": true,
		"application/vnd.docker.image.rootfs.diff.tar.gzip":            true,
		"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip":    true,
		"application/vnd.oci.image.layer.v1.tar+gzip+encrypted":        false,
		"application/vnd.oci.image.layer.v1.erofs":                     false,
		"application/octet-stream":                                     false,
		"":                                                             false,
	} {
		if KnownMediaType(mt) != want {
			t.Errorf("%q: %v", mt, !want)
		}
	}
}
