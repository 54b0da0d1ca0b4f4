package layer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/tree"
)

// neededByOldMounts tells what in objects/ overlays may look up that were mounted before the upgrade: the objects of
// all layers below snapshots that may be mounted, as long as one such overlay is seen.
func (l *oldLayout) neededByOldMounts(ctx context.Context) (func(content.ObjectID) bool, error) {
	all := func(content.ObjectID) bool { return true }
	none := func(content.ObjectID) bool { return false }
	mounted, err := l.oldMounted()
	if err != nil {
		return nil, err
	}
	if !mounted {
		return none, nil
	}
	if l.opts.Mounted == nil {
		return all, nil
	}
	layers, ok, err := l.opts.Mounted(ctx)
	if err != nil || !ok {
		return all, err
	}
	needed := map[content.ObjectID]struct{}{}
	for _, id := range layers {
		_, objects, err := tree.ReadFacts(l.treePath(id), id)
		if err != nil {
			return all, nil // whoever reads the tree finds out what is wrong with it
		}
		for _, o := range objects {
			needed[o] = struct{}{}
		}
	}
	return func(id content.ObjectID) bool {
		_, ok := needed[id]
		return ok || l.isFormer(id)
	}, nil
}

// oldMounted reports whether an overlay over objects/ may be mounted.
func (l *oldLayout) oldMounted() (bool, error) {
	boot := bootID()
	if boot == unknownBoot {
		return true, nil
	}
	mark := l.path(dirObjects, fileBoot)
	began, err := os.ReadFile(mark)
	switch {
	case err == nil && len(began) == len(boot) && string(began) != boot:
		return false, nil // no mount outlives the machine
	case err != nil || string(began) != boot:
		if err := os.WriteFile(mark, []byte(boot), 0o600); err != nil && !errors.Is(err, unix.ENOSPC) {
			return true, fmt.Errorf("note when the upgrade began: %w", err)
		}
	}
	return overlayOver(l.path(dirObjects))
}

// initialPidNS is what the first PID namespace is called: only from there all processes and their mounts are seen.
const initialPidNS = "pid:[4026531836]"

// overlayOver reports whether an overlay in any mount namespace has a directory among its layers, or it cannot be told.
func overlayOver(dir string) (bool, error) {
	if ns, err := os.Readlink("/proc/self/ns/pid"); err != nil || ns != initialPidNS {
		return true, nil
	}
	processes, err := os.ReadDir("/proc")
	if err != nil {
		return true, fmt.Errorf("look for mounts: %w", err)
	}
	seen := map[string]bool{}
	for _, p := range processes {
		if _, err := strconv.Atoi(p.Name()); err != nil {
			continue
		}
		ns, err := os.Readlink(filepath.Join("/proc", p.Name(), "ns/mnt"))
		if err != nil || seen[ns] {
			continue // it has ended; a zombie has no mounts either
		}
		info, err := os.ReadFile(filepath.Join("/proc", p.Name(), "mountinfo"))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
			continue
		}
		if err != nil {
			return true, fmt.Errorf("look for mounts: %w", err)
		}
		if seen[ns] = true; mountsOver(string(info), dir) {
			return true, nil
		}
	}
	return false, nil
}

// mountsOver reports whether a line of mountinfo, see proc(5), is of an overlay with this layer.
func mountsOver(info, dir string) bool {
	for line := range strings.Lines(info) {
		_, after, _ := strings.Cut(line, " - ")
		kind, rest, _ := strings.Cut(after, " ")
		if kind != "overlay" {
			continue
		}
		_, options, _ := strings.Cut(strings.TrimSuffix(rest, "\n"), " ")
		options = unescape(options)
		for {
			_, after, found := strings.Cut(options, dir)
			if !found {
				break
			}
			if after == "" || after[0] == ',' || after[0] == ':' {
				return true
			}
			options = after
		}
	}
	return false
}

// unescape is for the octal numbers that stand for blanks and the like in mountinfo.
func unescape(text string) string {
	var b strings.Builder
	for {
		before, after, found := strings.Cut(text, `\`)
		b.WriteString(before)
		if !found {
			return b.String()
		}
		if len(after) >= 3 {
			if n, err := strconv.ParseUint(after[:3], 8, 8); err == nil {
				b.WriteByte(byte(n))
				text = after[3:]
				continue
			}
		}
		b.WriteByte('\\')
		text = after
	}
}
