package powercut

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
)

func TestMain(m *testing.M) {
	if err := log.SetLevel("error"); err != nil {
		panic(err)
	}
	if os.Geteuid() == 0 && os.Getenv(ownMountsEnv) == "" {
		os.Exit(withOwnMounts())
	}
	os.Exit(m.Run())
}

const ownMountsEnv = "DEDUP_POWERCUT_OWN_MOUNTS"

// withOwnMounts runs the tests in a mount namespace of their own and returns the exit code. Who starts a container on
// this machine at the same time would otherwise take copies of the mounts along, and keep the disks busy with them.
func withOwnMounts() int {
	runtime.LockOSThread() // the child is to end with this thread
	cmd := exec.Command(os.Args[0], os.Args[1:]...)
	cmd.Env = append(os.Environ(), ownMountsEnv+"=1")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	err := cmd.Run()
	if _, ended := errors.AsType[*exec.ExitError](err); err != nil && !ended {
		fmt.Fprintln(os.Stderr, "start the tests in a mount namespace of their own:", err)
		return 1
	}
	return cmd.ProcessState.ExitCode()
}

// A store whose power is cut, after any flush and between, with what was not flushed lost, kept or kept in part, loses
// nothing that was acknowledged and holds nothing else. Where durability is deferred, what the cut caught is out of
// service, and never wrong - but for layers whose blobs may be dropped, which are whole. DEDUP_LONG=1 cuts after every
// flush, several times over, and DEDUP_POWERCUTS=n that often in each recording; DEDUP_POWERCUT_SEED=n repeats a
// choice, though not how the clients' work interleaved.
func TestPowerCut(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts file systems")
	}
	for _, row := range []struct {
		name       string
		fs         fileSystem
		durability layer.Durability
		cuts       int // in the short form
		recordings int // in the long form
	}{
		{"ext4", ext4, layer.Strict, 120, 2},
		{"xfs", xfs, layer.Strict, 60, 1},
		{"ext4-deferred", ext4, layer.Deferred, 40, 1},
	} {
		t.Run(row.name, func(t *testing.T) {
			cuts, recordings := row.cuts, 1
			if os.Getenv("DEDUP_LONG") != "" {
				cuts, recordings = 0, row.recordings
			}
			cuts = int(number(t, "DEDUP_POWERCUTS", uint64(cuts)))
			seed := number(t, "DEDUP_POWERCUT_SEED", rand.Uint64())
			t.Logf("seed %d", seed)
			for i := range recordings {
				record(t, row.fs, row.durability, seed+uint64(i), cuts)
				if t.Failed() {
					break
				}
			}
		})
	}
}

func number(t *testing.T, env string, otherwise uint64) uint64 {
	t.Helper()
	text := os.Getenv(env)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", env, err)
	}
	return n
}

// record runs the workload once and cuts what it left behind n times, 0 for after every flush.
func record(t *testing.T, on fileSystem, durability layer.Durability, seed uint64, n int) {
	t.Helper()
	dir := memory(t)
	d, base := format(t, dir, on)
	at := filepath.Join(dir, "at")
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	const ops = 150
	var w world
	t.Run("workload", func(t *testing.T) {
		d.attach(t, on.name, at)
		w = work(t, d, task{Dir: at, RunDir: filepath.Join(t.TempDir(), "run"), Seed: seed, Ops: ops, Durability: durability})
	})
	if t.Failed() || w == nil { // or skipped
		return
	}
	r := rand.New(rand.NewPCG(seed, 100))
	rp := &replay{log: d.recorded()[:w[len(w)-1].at], durable: base}
	rp.cuts = chooseCuts(rp.log, n, r)
	flushes, bytes := 0, 0
	for _, o := range rp.log {
		if bytes += len(o.data); o.data == nil {
			flushes++
		}
	}
	t.Logf("seed %d: %d operations by clients; %d writes (%d MB) and %d flushes of the disk", seed, ops,
		len(rp.log)-flushes, bytes>>20, flushes)
	start := time.Now()
	tried, refused := tryCuts(t, on, durability, dir, w, rp)
	counts := [3]int{}
	for _, c := range tried {
		counts[c.fate]++
	}
	t.Logf("tried %d cuts on %s in %s: unflushed writes dropped %d times, kept %d times, kept in part %d times",
		len(tried), on.name, time.Since(start).Round(time.Second), counts[dropped], counts[kept], counts[some])
	if durability == layer.Deferred {
		t.Logf("%d times a snapshot was out of service", refused)
	} else if refused > 0 {
		t.Errorf("%d times a snapshot was out of service", refused)
	}
}

// format makes an empty file system; base is a copy of it.
func format(t *testing.T, dir string, on fileSystem) (d *disk, base *os.File) {
	t.Helper()
	command := node.Command{Name: on.mkfs[0], Packages: on.packages}
	if err := node.Require(t.Context(), func(s string) { t.Log(s) }, command); err != nil {
		t.Skip(err)
	}
	mkfs, err := node.LookPath(on.mkfs[0])
	if err != nil {
		t.Skip(err)
	}
	var files [3]*os.File
	for i, name := range []string{"made", "recorded", "durable"} {
		if files[i], err = os.Create(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = files[i].Close() })
	}
	if err := files[0].Truncate(on.size); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(mkfs, append(on.mkfs[1:], files[0].Name())...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", mkfs, err, out)
	}
	if err := errors.Join(copySparse(files[1], files[0]), copySparse(files[2], files[0]),
		os.Remove(files[0].Name())); err != nil {
		t.Fatal(err)
	}
	return &disk{file: files[1]}, files[2]
}

// work runs the workload and notes what it says. Two times its process is killed, so that what a start cleans up after
// that is recorded as well.
func work(t *testing.T, d *disk, job task) (w world) {
	t.Helper()
	t.Cleanup(func() {
		if err := node.UnmountBelow(job.RunDir); err != nil {
			t.Error(err)
		}
	})
	const parts = 3
	total := job.Ops
	for job.Part = range parts {
		job.Ops = total * (job.Part + 1) / parts
		w = workPart(t, d, job, w, job.Part < parts-1)
		state := w.at(d.length())
		job.Have = slices.Collect(maps.Values(state.have))
		job.First = job.Ops + 10 // no name is used twice
	}
	return append(w, noted{at: d.length()})
}

// workPart is one process. One that is to be killed is so when the number of its operations comes near its end.
func workPart(t *testing.T, d *disk, job task, w world, kill bool) world {
	t.Helper()
	text, err := json.Marshal(job)
	if err != nil {
		t.Fatal(err)
	}
	fromChild, events, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	answers, toChild, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestWorkload$")
	cmd.Env = append(os.Environ(), workloadEnv+"="+string(text))
	cmd.ExtraFiles = []*os.File{events, answers}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Start()
	_, _ = events.Close(), answers.Close()
	defer fromChild.Close()
	defer toChild.Close()
	if err != nil {
		t.Fatal(err)
	}
	in, answer := json.NewDecoder(fromChild), json.NewEncoder(toChild)
	for {
		var e event
		if err := in.Decode(&e); err != nil {
			if !errors.Is(err, io.EOF) {
				t.Error(err)
			}
			break
		}
		w = append(w, noted{d.length(), e})
		if e.Kind == "failed" {
			t.Error(e.Error)
		}
		if err := answer.Encode(true); err != nil {
			t.Error(err)
			break
		}
		if kill && e.Kind == "doing" && e.Op >= job.Ops-2 {
			time.Sleep(time.Duration(job.Seed%10) * time.Millisecond) // somewhere in what it does
			if err := cmd.Process.Kill(); err != nil {
				t.Error(err)
			}
			break
		}
	}
	if err := cmd.Wait(); err != nil && !kill {
		t.Errorf("the workload: %v\n%s", err, out.String())
	}
	return w
}

func tryCuts(t *testing.T, on fileSystem, durability layer.Durability, dir string, w world, rp *replay) (tried []cut,
	refused int) {
	t.Helper()
	refs := &references{made: map[reference]rootfs.Tree{}}
	var wg sync.WaitGroup
	var mu sync.Mutex // guards tried and refused
	var trimmed atomic.Int64
	for i := range 2 {
		c := &checker{t: t, fs: on, refs: refs, durability: durability, dir: filepath.Join(dir, fmt.Sprint("checker-", i))}
		if err := os.Mkdir(c.dir, 0o700); err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			defer func() { trimmed.Add(int64(c.trimmed)) }()
			for !t.Failed() {
				cut, ok, err := c.try(w, rp)
				if err != nil {
					t.Errorf("%s of %d: %v", cut, len(rp.log), err)
				}
				if !ok {
					return
				}
				mu.Lock()
				tried, refused = append(tried, cut), refused+len(c.refused)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	t.Logf("%d times a snapshot was whole whose blob may have gone", trimmed.Load())
	return tried, refused
}
