package snapshotter

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/quota"
)

func TestParseSize(t *testing.T) {
	for text, want := range map[string]uint64{"1048576": 1 << 20, "20000000000": 2e10, "9223372036854775807": 1<<63 - 1} {
		if got, err := parseSize(text); got != want || err != nil {
			t.Errorf("%q: %d, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "0", "-1", "1048575", "100MB", "1e9", "0x100000", " 1048576",
		"9223372036854775808"} {
		_, err := parseSize(text)
		want := fmt.Sprintf("label containerd.io/snapshot/max-size = %q", text)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func maxSize(text string) snapshots.Opt {
	return snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotMaxSize: text})
}

// A container is refused for a label that is wrong. A layer and a view are not, since their labels may come from an
// image; and no file system is needed that limits anything.
func TestMaxSizeLabel(t *testing.T) {
	s, ctx := open(t, t.TempDir()), ns(t, "a")
	if _, err := s.Prepare(ctx, "a/1/bad", "", maxSize("much")); !errdefs.IsInvalidArgument(err) {
		t.Errorf("container: %v", err)
	}
	_, err := s.Prepare(ctx, "a/2/extract-1", "", maxSize("much"))
	if _, verr := s.View(ctx, "a/3/view", "", maxSize("much")); err != nil || verr != nil {
		t.Errorf("layer: %v; view: %v", err, verr)
	}
	if _, err := s.Prepare(ctx, "a/4/good", "", maxSize("1048576")); err != nil {
		t.Error(err)
	}
	if _, err := s.Stat(ctx, "a/1/bad"); !errdefs.IsNotFound(err) {
		t.Errorf("what was refused: %v", err)
	}
	if got := len(s.limits.of); s.limits.why != nil && got != 0 {
		t.Errorf("%d limits that nothing enforces", got)
	}
	for _, key := range []string{"a/2/extract-1", "a/3/view", "a/4/good"} {
		must(t, s.Remove(ctx, key))
	}
}

// onQuotas runs a test on each file system that enforces project quotas, where the kernel has them.
func onQuotas(t *testing.T, test func(t *testing.T, root string)) {
	needRoot(t)
	for name, mkfs := range map[string][]string{
		"xfs": {"mkfs.xfs", "-q"}, "ext4": {"mkfs.ext4", "-q", "-O", "project,quota", "-E", "quotatype=prjquota"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			file, at := filepath.Join(dir, "disk"), filepath.Join(dir, "at")
			for _, args := range [][]string{
				{"truncate", "-s", "400M", file}, append(mkfs, file), {"mkdir", at},
				{"mount", "-t", name, "-o", "loop,prjquota", file, at},
			} {
				if out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput(); err != nil {
					t.Skipf("%v: %v\n%s", args, err, out)
				}
			}
			t.Cleanup(func() { must(t, unix.Unmount(at, 0)) })
			if err := quota.Probe(at); err != nil {
				t.Skipf("this kernel has no project quotas of %s: %v", name, err)
			}
			test(t, filepath.Join(at, "root"))
		})
	}
}

// A container writes up to its limit, in old directories and in new ones, and another one goes on. The limit outlives
// the daemon. It is no longer there, and its project another's, after the snapshot is removed, or committed, which
// makes a layer of all that was written.
func TestMaxSize(t *testing.T) {
	onQuotas(t, func(t *testing.T, root string) {
		const size = 4 << 20
		s, ctx := open(t, root), ns(t, "a")
		parent, _ := unpack(t, s, "a", "", layerTar(t, map[string]string{"dir/file": "x", "own": "x"}), nil)
		write := func(key string) (n int) {
			t.Helper()
			mounts, err := s.Mounts(ctx, key)
			must(t, err)
			at := t.TempDir()
			must(t, mount.All(mounts, at))
			defer func() { must(t, unix.Unmount(at, 0)) }()
			must(t, os.MkdirAll(filepath.Join(at, "new/below"), 0o755))
			for _, name := range []string{"new/below/file", "dir/file"} { // the second is copied up
				n += fillFile(t, filepath.Join(at, name), size)
			}
			var st unix.Statfs_t
			must(t, unix.Statfs(at, &st))
			t.Logf("%s: %d bytes written; df: %d", key, n, st.Blocks*uint64(st.Bsize))
			return n
		}
		for _, key := range []string{"a/1/removed", "a/2/committed"} {
			_, err := s.Prepare(ctx, key, parent, maxSize(fmt.Sprint(size)))
			must(t, err)
		}
		_, err := s.Prepare(ctx, "a/3/free", parent)
		must(t, err)
		for _, key := range []string{"a/1/removed", "a/2/committed"} {
			if n := write(key); n < size/2 || n > size {
				t.Errorf("%s: %d bytes were written, the limit is %d", key, n, size)
			}
		}
		if n := write("a/3/free"); n != 2*size {
			t.Errorf("without a limit %d bytes were written", n)
		}
		must(t, stop(s))
		s = open(t, root)
		// It is full, is mounted writable all the same, and is full again.
		if n := write("a/1/removed"); n < size/2 || n > size+mountRoom {
			t.Errorf("after a restart %d bytes were written", n)
		}
		used := map[quota.Project]bool{}
		for _, l := range s.limits.of {
			used[l.project] = true
		}
		if len(used) != 2 {
			t.Fatalf("projects %v", used)
		}
		u, err := s.Usage(ctx, "a/1/removed")
		if err != nil || u.Size < size/2 || u.Size > size+mountRoom {
			t.Errorf("usage %+v, %v", u, err)
		}
		info, err := s.Stat(ctx, "a/1/removed")
		if _, ok := info.Labels[labelLimit]; ok || err != nil {
			t.Errorf("labels %v, %v", info.Labels, err)
		}
		must(t, s.Remove(ctx, "a/1/removed"))
		must(t, s.Commit(ctx, "a/4/layer", "a/2/committed"))
		_, err = s.View(ctx, "a/5/view", "a/4/layer") // waits for the ingest, or lies over the directory and keeps it
		must(t, err)
		must(t, s.Remove(ctx, "a/5/view"))
		for p := range used {
			waitIdle(t, s, p)
		}
		if len(s.limits.of) != 0 {
			t.Errorf("limits left: %v", s.limits.of)
		}
		leavesNothing(t, s, "a/3/free", "a/4/layer", parent)
	})
}

// What was copied to another disk, without projects and limits, has its limit again when it is mounted: also when the
// process that put it back was killed before it was done. Where others use the project by now, it is not mounted.
func TestMaxSizeCopied(t *testing.T) {
	onQuotas(t, func(t *testing.T, root string) {
		const size = 4 << 20
		s, ctx := open(t, root), ns(t, "a")
		write := func(name string) int {
			t.Helper()
			mounts, err := s.Mounts(ctx, "a/1/one")
			must(t, err)
			at := t.TempDir()
			must(t, mount.All(mounts, at))
			defer func() { must(t, unix.Unmount(at, 0)) }()
			must(t, os.MkdirAll(filepath.Join(at, "dir"), 0o755))
			return fillFile(t, filepath.Join(at, "dir", name), size/4)
		}
		_, err := s.Prepare(ctx, "a/1/one", "", maxSize(fmt.Sprint(size)))
		must(t, err)
		if n := write("first"); n != size/4 {
			t.Fatalf("%d bytes were written", n)
		}
		dir := s.path(dirSnapshots, idOf(t, s, "a/1/one"))
		p := s.limits.of[filepath.Base(dir)].project
		for _, state := range []string{"copied", "interrupted"} {
			must(t, stop(s))
			must(t, errors.Join(quota.AssignTree(dir, 0), quota.Limit(dir, p, 0)))
			if state == "interrupted" {
				must(t, quota.Assign(dir, p))
			} else { // what cannot be given a project
				must(t, os.Symlink("/", filepath.Join(dir, "fs/dir/out")))
				must(t, unix.Mkfifo(filepath.Join(dir, "fs/dir/fifo"), 0o600))
			}
			waitFor(t, dir, p, func(u quota.Usage) bool { return u.Used < size/4 })
			s = open(t, root)
			n := write(state)
			u, err := quota.Look(dir, p)
			if n != size/4 || err != nil || u.Used < size/4+uint64(n) || u.Limit != size {
				t.Errorf("%s: %d bytes more were written, of the project is known: %+v, %v", state, n, u, err)
			}
		}
		for _, name := range []string{"more", "most"} {
			write(name)
		}
		if u, err := quota.Look(dir, p); err != nil || u.Used > size+mountRoom {
			t.Errorf("used is %+v, %v", u, err)
		}
		must(t, quota.AssignTree(dir, 0))
		other := filepath.Join(root, "../other")
		must(t, errors.Join(os.Mkdir(other, 0o700), quota.Assign(other, p)))
		if _, err := s.Mounts(ctx, "a/1/one"); err == nil || !strings.Contains(err.Error(), "files of others") {
			t.Errorf("with a project that others use: %v", err)
		}
		must(t, os.Remove(other))
		leavesNothing(t, s, "a/1/one")
	})
}

// leavesNothing removes snapshots and looks for stray directories.
func leavesNothing(t *testing.T, s *Snapshotter, keys ...string) {
	t.Helper()
	for _, key := range keys {
		must(t, s.Remove(ns(t, "a"), key))
	}
	s.layers.Wait()
	must(t, s.Cleanup(t.Context()))
	found, err := s.Check(t.Context(), CheckOptions{})
	if err != nil || len(found) > 0 {
		t.Errorf("%v, %v", found, err)
	}
}

// waitIdle waits until nothing is charged to a project: XFS frees inodes a moment after their last name.
func waitIdle(t *testing.T, s *Snapshotter, p quota.Project) {
	t.Helper()
	waitFor(t, s.path(dirSnapshots), p, quota.Usage.Idle)
}

// waitFor waits until a project's usage is as wanted.
func waitFor(t *testing.T, dir string, p quota.Project, wanted func(quota.Usage) bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		u, err := quota.Look(dir, p)
		if err == nil && wanted(u) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("project %d: %+v, %v", p, u, err)
		}
	}
}

// fillFile writes what the kernel takes, up to size.
func fillFile(t *testing.T, path string, size int) (n int) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return 0
	}
	must(t, err)
	defer f.Close()
	buf := bytes.Repeat([]byte("x"), 64<<10)
	for n < size && err == nil {
		var m int
		m, err = f.Write(buf)
		n += m
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		t.Fatal(err)
	}
	return n
}

const limitStepEnv = "DEDUP_LIMIT_STEP"

// A process that is killed anywhere between the record of a limit and the end of its removal, or of its commit, leaves
// a store that opens, and where the container is removed, no limit and nothing charged.
func TestMaxSizeKilled(t *testing.T) {
	onQuotas(t, func(t *testing.T, root string) {
		// root may have a project of its own, which keeps directories of other projects from being moved there.
		must(t, errors.Join(os.Mkdir(root, 0o700), quota.Assign(root, 7)))
		for _, step := range []string{"prepare.recorded", "limit.assigned", "limit.set", "prepare.made",
			"remove.recorded", "remove discard.renamed", "remove limit.lifted", "remove discard.done",
			"commit.recorded", "pending.ingested", "pending.noted", "commit discard.renamed", "commit limit.lifted"} {
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestMaxSizeChild$")
			cmd.Env = append(os.Environ(), limitStepEnv+"="+root+"\n"+step)
			if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(err.Error(), "killed") {
				t.Fatalf("%s: not killed: %v\n%s", step, err, out)
			}
			s := open(t, root)
			used, err := os.ReadFile(filepath.Join(root, "../project"))
			must(t, err)
			var p quota.Project
			_, err = fmt.Sscan(string(used), &p)
			must(t, err)
			limitAfterKill(t, s, step, p)
			waitIdle(t, s, p)
			leavesNothing(t, s)
			must(t, stop(s))
		}
	})
}

// limitAfterKill removes what the killed process has left of its container, which has the project, or of its layer.
func limitAfterKill(t *testing.T, s *Snapshotter, step string, p quota.Project) {
	t.Helper()
	ctx := ns(t, "a")
	if _, err := s.Stat(ctx, "a/2/layer"); err == nil {
		if err := s.Remove(ctx, "a/3/view"); err != nil && !errdefs.IsNotFound(err) {
			t.Error(err)
		}
		_, err := s.View(ctx, "a/3/view", "a/2/layer") // waits for the ingest
		must(t, errors.Join(err, s.Remove(ctx, "a/3/view"), s.Remove(ctx, "a/2/layer")))
	}
	if _, err := s.Stat(ctx, "a/1/one"); err != nil {
		return
	}
	if l := s.limits.of[idOf(t, s, "a/1/one")]; l.project != p {
		t.Errorf("%s: project %d was used, then %d", step, p, l.project)
	}
	mounts, err := s.Mounts(ctx, "a/1/one")
	must(t, err)
	at := t.TempDir()
	must(t, mount.All(mounts, at))
	if n := fillFile(t, filepath.Join(at, "file"), 4<<20); n > 2<<20 {
		t.Errorf("%s: %d bytes were written", step, n)
	}
	must(t, errors.Join(unix.Unmount(at, 0), s.Remove(ctx, "a/1/one")))
}

func idOf(t *testing.T, s *Snapshotter, key string) (id string) {
	t.Helper()
	must(t, s.db.view(t.Context(), func(ctx context.Context) (err error) {
		id, _, _, err = getInfo(ctx, key)
		return err
	}))
	return id
}

// TestMaxSizeChild is the process that TestMaxSizeKilled runs.
func TestMaxSizeChild(t *testing.T) {
	root, step, ok := strings.Cut(os.Getenv(limitStepEnv), "\n")
	if !ok {
		t.Skip("started by TestMaxSizeKilled alone")
	}
	last, commit := step, strings.HasPrefix(step, "commit") || strings.HasPrefix(step, "pending")
	if _, after, ok := strings.Cut(step, " "); ok {
		last = after
	}
	var s *Snapshotter
	s, err := New(t.Context(), Options{Root: root, RunDir: filepath.Join(root, "run"), Step: func(name string) {
		if name == "prepare.recorded" {
			for _, l := range s.limits.of {
				must(t, os.WriteFile(filepath.Join(root, "../project"), []byte(fmt.Sprint(l.project)), 0o600))
			}
		}
		if name == last {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {} // until it arrives
		}
	}})
	must(t, err)
	ctx := namespaces.WithNamespace(context.Background(), "a")
	mounts, err := s.Prepare(ctx, "a/1/one", "", maxSize("2097152"))
	must(t, err)
	at := t.TempDir()
	must(t, mount.All(mounts, at))
	fillFile(t, filepath.Join(at, "file"), 1<<20)
	must(t, unix.Unmount(at, 0))
	if commit {
		must(t, s.Commit(ctx, "a/2/layer", "a/1/one"))
		_, err := s.View(ctx, "a/3/view", "a/2/layer") // waits for the ingest
		must(t, err)
	} else {
		must(t, s.Remove(ctx, "a/1/one"))
	}
	must(t, stop(s))
}
