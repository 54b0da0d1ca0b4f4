package archive

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// igzip (package isal) decompresses gzip at two to three times the speed of any Go library. containerd
// uses it where it is installed, and so do we, under the same switch.
const disableIgzip = "CONTAINERD_DISABLE_IGZIP"

// pipeSize is asked for, so that the two processes seldom wait for each other.
const pipeSize = 1 << 20

// waitDelay is how long a killed igzip's feeder may take to notice.
const waitDelay = 5 * time.Second

var findIgzip = sync.OnceValue(func() string {
	if off, err := strconv.ParseBool(os.Getenv(disableIgzip)); err == nil && off {
		return ""
	}
	path, err := exec.LookPath("igzip")
	if err != nil {
		return ""
	}
	return path
})

// igzip is a running decompressor. Its Read ends with an error unless the whole blob was good.
type igzip struct {
	cmd    *exec.Cmd
	cancel context.CancelFunc
	out    io.ReadCloser
	stderr bytes.Buffer
	done   bool
}

func startIgzip(path string, src io.Reader) (*igzip, error) {
	ctx, cancel := context.WithCancel(context.Background())
	z := &igzip{cancel: cancel, cmd: exec.CommandContext(ctx, path, "-d", "-c")}
	z.cmd.Stdin, z.cmd.Stderr, z.cmd.Env = src, &z.stderr, []string{}
	// Stdin that is no file is fed by a goroutine that may hang in a read of its own.
	z.cmd.WaitDelay = waitDelay
	var err error
	if z.out, err = z.cmd.StdoutPipe(); err == nil {
		if f, ok := z.out.(*os.File); ok {
			// Only a help: an unprivileged user's limit may be lower.
			_, _ = unix.FcntlInt(f.Fd(), unix.F_SETPIPE_SZ, pipeSize)
		}
		err = z.cmd.Start()
	}
	if err != nil {
		cancel()
		return nil, fmt.Errorf("start igzip: %w", err)
	}
	return z, nil
}

func (z *igzip) Read(p []byte) (int, error) {
	if z.done {
		return 0, io.EOF
	}
	n, err := z.out.Read(p)
	if errors.Is(err, io.EOF) {
		z.done = true
		if werr := z.cmd.Wait(); werr != nil {
			err = z.explain(werr)
		}
	}
	return n, err
}

// errNoVerdict is wrapped when igzip did not end by itself (out of memory, an
// operator's kill): that says nothing about the blob.
var errNoVerdict = errors.New("igzip did not finish")

// explain makes of igzip's words what the Go library says.
func (z *igzip) explain(err error) error {
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || !exit.Exited() {
		return fmt.Errorf("%w: %w", errNoVerdict, err)
	}
	said := strings.TrimSpace(z.stderr.String())
	if strings.Contains(said, "complete gzip file") {
		return io.ErrUnexpectedEOF
	}
	return fmt.Errorf("igzip: %w: %s", err, said)
}

// Close ends the process if it still runs.
func (z *igzip) Close() error {
	z.cancel()
	if !z.done {
		z.done = true
		_ = z.out.Close()
		_ = z.cmd.Wait() // killed: its status says nothing
	}
	return nil
}
