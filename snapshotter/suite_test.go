package snapshotter

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: it mounts overlayfs and EROFS")
	}
}

// testVerity is the setting that tests open their stores with: DEDUP_TEST_VERITY=on has all of them use fs-verity.
func testVerity() lower.Verity { return lower.Verity(os.Getenv("DEDUP_TEST_VERITY")) }

// testPageCache is the other: DEDUP_TEST_PAGE_CACHE=private has none of them share memory among images.
func testPageCache() lower.PageCache { return lower.PageCache(os.Getenv("DEDUP_TEST_PAGE_CACHE")) }

// testNoDense is one more: DEDUP_TEST_DENSE=off has all of them be as under a kernel that mounts no dense packs.
func testNoDense() error {
	if os.Getenv("DEDUP_TEST_DENSE") == "off" {
		return errNoDense
	}
	return nil
}

var errNoDense = errors.New("a kernel that mounts no blocks of 512 bytes")

// mountsBelow lists what is mounted below dir.
func mountsBelow(t testing.TB, dir string) (points []string) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if p := strings.Fields(line)[4]; strings.HasPrefix(p, dir+"/") {
			points = append(points, p)
		}
	}
	return points
}

// stop closes a snapshotter and unmounts what it leaves mounted for containers.
func stop(s *Snapshotter) error {
	err := s.Close()
	names, lerr := s.chains.List()
	for _, n := range names {
		at := s.chains.MountPoint(n)
		lerr = errors.Join(lerr, mount.UnmountAll(at+".view", 0), mount.UnmountAll(at, 0))
	}
	for _, dir := range []string{dirPackMounts, dirViews} {
		points, gerr := filepath.Glob(filepath.Join(s.opts.RunDir, dir, "*"))
		for _, path := range points {
			lerr = errors.Join(lerr, gerr, mount.UnmountAll(path, 0))
		}
	}
	return errors.Join(err, lerr)
}

// suiteName tells the suite which of the kernel's limits hold: as with containerd's own overlayfs
// snapshotter, a directory of a lower layer cannot be renamed (EXDEV), and tools copy instead.
const suiteName = "overlayfs"

func TestSuiteInProcess(t *testing.T) {
	needRoot(t)
	testsuite.SnapshotterSuite(t, suiteName, func(ctx context.Context, root string) (snapshots.Snapshotter, func() error,
		error) {
		s, err := New(ctx, Options{Root: root, RunDir: filepath.Join(root, "run"), Verity: testVerity(),
			PageCache: testPageCache(), noDense: testNoDense()})
		if err != nil {
			return nil, nil, err
		}
		return s, func() error { return stop(s) }, nil
	})
}

func TestSuiteThroughSocket(t *testing.T) {
	needRoot(t)
	testsuite.SnapshotterSuite(t, suiteName, func(ctx context.Context, root string) (snapshots.Snapshotter, func() error,
		error) {
		s, err := New(ctx, Options{Root: root, RunDir: filepath.Join(root, "run"), Verity: testVerity(),
			PageCache: testPageCache(), noDense: testNoDense()})
		if err != nil {
			return nil, nil, err
		}
		dir, err := os.MkdirTemp("", "dedup-socket-")
		if err != nil {
			return nil, nil, err
		}
		socket := filepath.Join(dir, "s")
		l, err := net.Listen("unix", socket)
		if err != nil {
			return nil, nil, err
		}
		server := grpc.NewServer()
		snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(s))
		go func() { _ = server.Serve(l) }()
		conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return nil, nil, err
		}
		return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "dedup"), func() error {
			err := conn.Close()
			server.Stop()
			return errors.Join(err, stop(s), os.RemoveAll(dir))
		}, nil
	})
}
