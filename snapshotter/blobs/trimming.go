package blobs

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
)

const (
	// lookEvery is how often Run looks without being asked: leases end, and images lose their mark.
	lookEvery = 10 * time.Minute
	// kickDelay is how long after a commit it looks: after its pull has settled, most likely.
	kickDelay = settleFor + time.Second
	// failedDelay is how long after an error it tries again.
	failedDelay = time.Minute
)

// Committed tells Run that a layer came in. It does not block.
func (t *Trimmer) Committed() {
	select {
	case t.kick <- struct{}{}:
	default:
	}
}

// Run lets go of blobs as their layers come in, until ctx ends (blobs = "drop").
func (t *Trimmer) Run(ctx context.Context) {
	// A process that was killed may have left garbage, or pulls that it has not seen the end of.
	next := time.NewTimer(kickDelay)
	defer next.Stop()
	collect := true
	at := time.Now().Add(kickDelay)
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.kick:
			if until := time.Now().Add(kickDelay); until.Before(at) {
				at = until
				next.Reset(kickDelay)
			}
			continue
		case <-next.C:
		}
		wait := t.sweep(ctx, collect)
		collect = false
		at = time.Now().Add(wait)
		next.Reset(wait)
	}
}

// sweep does it once, and returns when to do it again.
func (t *Trimmer) sweep(ctx context.Context, collect bool) time.Duration {
	plan, err := t.Plan(ctx, TrimOptions{Settled: true})
	if err == nil && collect && len(plan.Images) > 0 {
		err = t.Collect(ctx, plan.Images[0].Namespace)
	}
	var done TrimPlan
	if err == nil {
		done, err = t.Execute(ctx, plan)
	}
	switch {
	case ctx.Err() != nil:
		return lookEvery
	case err != nil:
		log.G(ctx).WithError(err).Warn("blobs that no container needs stay in containerd's content store for now")
		return failedDelay
	case done.Blobs > 0:
		log.G(ctx).Infof("let go of %d blobs, %d bytes, in containerd's content store: their layers are stored here",
			done.Blobs, done.Bytes)
	}
	if !plan.again.IsZero() {
		return min(lookEvery, max(time.Second, time.Until(plan.again)))
	}
	return lookEvery
}

// beingRead returns the blobs that containerd has open at this moment: a push or an export of theirs would end halfway.
// Nothing where containerd's process cannot be seen.
func (c *Catalog) beingRead(ctx context.Context, s *Store) map[digest.Digest]bool {
	root := s.directory(ctx)
	pid, err := c.process(ctx)
	if err != nil || root == "" {
		return nil
	}
	fds := filepath.Join("/proc", strconv.Itoa(pid), "fd")
	files, err := os.ReadDir(fds)
	if err != nil {
		return nil
	}
	open := map[digest.Digest]bool{}
	for _, f := range files {
		path, err := os.Readlink(filepath.Join(fds, f.Name()))
		if err != nil {
			continue
		}
		if rest, ok := strings.CutPrefix(path, filepath.Join(root, "blobs")+"/"); ok {
			open[digest.Digest(strings.Replace(rest, "/", ":", 1))] = true
		}
	}
	return open
}

// process is containerd's pid, as far as this process sees it.
func (c *Catalog) process(ctx context.Context) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	server, err := c.plugins.Server(ctx, &emptypb.Empty{})
	if err != nil {
		return 0, err
	}
	var own unix.Stat_t
	if err := unix.Stat("/proc/self/ns/pid", &own); err != nil {
		return 0, err
	}
	if server.Pid == 0 || server.Pidns != own.Ino {
		return 0, errors.New("containerd runs in another pid namespace")
	}
	return int(server.Pid), nil
}
