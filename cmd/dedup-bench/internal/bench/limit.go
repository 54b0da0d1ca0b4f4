package bench

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedup-bench/internal/report"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// Limit is the name of the subject that is none: it only decompresses and hashes.
const Limit = "limit"

// limits measures each scenario's images with nothing but what no pull can leave out: all blobs side by
// side, each decompressed, its tar hashed once for the diffID and once more for what the files
// are named by, and the blob hashed as whoever downloads it has to.
func (seq sequence) limits(ctx context.Context, opts Options) (samples []report.Sample, err error) {
	for _, part := range []struct {
		scenario string
		images   []Image
	}{{"cold", []Image{seq.cold}}, {"rebuild", newTo(seq.rebuild, seq.cold)}} {
		if len(part.images) == 0 {
			continue
		}
		if err := settle(part.images...); err != nil {
			return nil, err
		}
		before, err := ownCPU()
		if err != nil {
			return nil, err
		}
		start := time.Now()
		eg, ctx := errgroup.WithContext(ctx)
		for _, img := range part.images {
			for _, blob := range img.Blobs {
				eg.Go(func() error { return decompressAndHash(ctx, blob, opts.Igzip) })
			}
		}
		if err := eg.Wait(); err != nil {
			return nil, fmt.Errorf("limit: %w", err)
		}
		wall := time.Since(start)
		after, err := ownCPU()
		if err != nil {
			return nil, err
		}
		figure := report.Sample{Scenario: part.scenario, Subject: Limit, Metric: "pull", Unit: "s", Value: wall.Seconds()}
		samples = append(samples, figure)
		figure.Metric, figure.Value = "CPU", (after - before).Seconds()
		samples = append(samples, figure)
	}
	return samples, nil
}

// newTo leaves out the layers that an earlier image has brought already: nobody
// decompresses those again.
func newTo(images []Image, earlier Image) []Image {
	have := map[string]bool{}
	for _, blob := range earlier.Blobs {
		have[filepath.Base(blob)] = true
	}
	var left []Image
	for _, img := range images {
		var blobs []string
		for _, blob := range img.Blobs {
			if !have[filepath.Base(blob)] {
				blobs = append(blobs, blob)
			}
			have[filepath.Base(blob)] = true
		}
		img.Blobs = blobs
		left = append(left, img)
	}
	return left
}

func decompressAndHash(ctx context.Context, blob string, igzip bool) (err error) {
	f, err := os.Open(blob)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	var magic [4]byte
	if _, err := f.ReadAt(magic[:], 0); err != nil {
		return fmt.Errorf("read %s: %w", blob, err)
	}
	eg, ctx := errgroup.WithContext(ctx)
	eg.Go(func() error { return hashFile(blob) })
	eg.Go(func() error {
		tar, wait, err := decompress(ctx, f, magic, igzip)
		if err != nil {
			return err
		}
		return errors.Join(hashTwice(tar), wait())
	})
	return eg.Wait()
}

func decompress(ctx context.Context, f *os.File, magic [4]byte, igzip bool) (io.Reader, func() error, error) {
	none := func() error { return nil }
	switch {
	case magic == [4]byte{0x28, 0xb5, 0x2f, 0xfd}:
		z, err := zstd.NewReader(f)
		return z, none, err
	case magic[0] != 0x1f || magic[1] != 0x8b:
		return f, none, nil
	case !igzip:
		z, err := gzip.NewReader(f)
		return z, none, err
	}
	path, err := node.LookPath(node.Igzip.Name)
	if err != nil {
		return nil, nil, err
	}
	cmd := exec.CommandContext(ctx, path, "-d", "-c")
	cmd.Stdin = f
	r, w, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	// As whoever wants speed does; the default holds 64 KiB.
	_, _ = unix.FcntlInt(w.Fd(), unix.F_SETPIPE_SZ, 1<<20)
	cmd.Stdout = w
	err = cmd.Start()
	if err := errors.Join(err, w.Close()); err != nil {
		return nil, nil, errors.Join(err, r.Close())
	}
	return r, func() error { return errors.Join(cmd.Wait(), r.Close()) }, nil
}

// hashTwice hashes a stream in two goroutines while it is read.
func hashTwice(r io.Reader) error {
	const ahead = 8
	var to [2]chan []byte
	free := [2]chan []byte{make(chan []byte, ahead), make(chan []byte, ahead)}
	var eg errgroup.Group
	for i := range to {
		to[i] = make(chan []byte, ahead)
		eg.Go(func() error {
			h := sha256.New()
			for p := range to[i] {
				h.Write(p)
				free[i] <- p
			}
			return nil
		})
	}
	var err error
	for n := 0; err == nil; n++ {
		var p []byte
		if n < ahead {
			p = make([]byte, 1<<20)
		} else { // both are done with the oldest, which comes back first
			p = <-free[0]
			<-free[1]
			p = p[:cap(p)]
		}
		var got int
		got, err = io.ReadFull(r, p)
		for _, c := range to {
			c <- p[:got]
		}
	}
	for _, c := range to {
		close(c)
	}
	_ = eg.Wait()
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	return err
}

func hashFile(path string) (err error) {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	_, err = io.CopyBuffer(struct{ io.Writer }{sha256.New()}, struct{ io.Reader }{f}, make([]byte, 1<<20))
	return err
}

// ownCPU is the CPU time of this process and of the children it has waited for.
func ownCPU() (time.Duration, error) {
	var total time.Duration
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var u unix.Rusage
		if err := unix.Getrusage(who, &u); err != nil {
			return 0, fmt.Errorf("read CPU time: %w", err)
		}
		total += time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	return total, nil
}
