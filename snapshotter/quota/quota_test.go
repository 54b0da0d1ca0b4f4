package quota

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// fileSystems are those that have project quotas, and how they are made and mounted.
var fileSystems = []struct {
	name    string
	mkfs    []string
	options string
}{
	{"xfs", []string{"mkfs.xfs", "-q"}, "loop,prjquota"},
	{"ext4", []string{"mkfs.ext4", "-q", "-O", "project,quota", "-E", "quotatype=prjquota"}, "loop,prjquota"},
}

// mountNew mounts a new file system until the test ends.
func mountNew(t *testing.T, kind string, mkfs []string, options string) (at string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: it mounts file systems")
	}
	dir := t.TempDir()
	file, at := filepath.Join(dir, "disk"), filepath.Join(dir, "at")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, 400<<20), os.Mkdir(at, 0o755)); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{append(mkfs[:len(mkfs):len(mkfs)], file),
		{"mount", "-t", kind, "-o", options, file, at}} {
		if out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Skipf("%v: %v\n%s", args, err, out)
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Error(err)
		}
	})
	return at
}

// A directory's files stop at its limit, also those in directories that are made later; others go on; a new limit and
// none count at once.
func TestLimit(t *testing.T) {
	for _, fs := range fileSystems {
		t.Run(fs.name, func(t *testing.T) {
			at := mountNew(t, fs.name, fs.mkfs, fs.options)
			if err := Probe(at); err != nil {
				t.Skipf("this kernel has no project quotas of %s: %v", fs.name, err)
			}
			const p, size = 4_000_000_000, 4 << 20
			if u, err := Look(at, p); err != nil || !u.Idle() {
				t.Fatalf("before: %+v, %v", u, err)
			}
			limited, free := filepath.Join(at, "limited"), filepath.Join(at, "free")
			err := errors.Join(os.Mkdir(limited, 0o755), os.Mkdir(free, 0o755), Assign(limited, p), Limit(at, p, size),
				os.Mkdir(filepath.Join(limited, "below"), 0o755))
			if err != nil {
				t.Fatal(err)
			}
			if got, err := Of(filepath.Join(limited, "below")); got != p || err != nil {
				t.Errorf("project of what was made in it: %d, %v", got, err)
			}
			if n := fill(t, filepath.Join(limited, "below", "file"), 2*size); n < size/2 || n > size {
				t.Errorf("%d bytes were written", n)
			}
			if n := fill(t, filepath.Join(free, "file"), 2*size); n != 2*size {
				t.Errorf("beside it %d bytes were written", n)
			}
			if u, err := Look(at, p); err != nil || u.Limit != size || u.Used < size/2 || u.Inodes < 3 {
				t.Errorf("full: %+v, %v", u, err)
			}
			if err := Limit(at, p, 2*size); err != nil {
				t.Error(err)
			}
			if n := fill(t, filepath.Join(limited, "more"), size/2); n != size/2 {
				t.Errorf("with a larger limit %d bytes were written", n)
			}
			if err := Limit(at, p, 0); err != nil {
				t.Error(err)
			}
			if n := fill(t, filepath.Join(limited, "more"), 4*size); n != 4*size {
				t.Errorf("without a limit %d bytes were written", n)
			}
			if err := Rename(limited, filepath.Join(at, "renamed")); err != nil {
				t.Error(err)
			}
		})
	}
}

// Where the directory that holds them is a project itself, directories of other projects can be moved out of sight.
func TestRenameBelowProject(t *testing.T) {
	for _, fs := range fileSystems {
		t.Run(fs.name, func(t *testing.T) {
			at := mountNew(t, fs.name, fs.mkfs, fs.options)
			if err := Probe(at); err != nil {
				t.Skipf("this kernel has no project quotas of %s: %v", fs.name, err)
			}
			root, one := filepath.Join(at, "root"), filepath.Join(at, "root", "one")
			err := errors.Join(os.Mkdir(root, 0o755), Assign(root, 7), os.Mkdir(one, 0o755), Assign(one, 8))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(one, one+"-gone"); !errors.Is(err, unix.EXDEV) {
				t.Errorf("without: %v", err)
			}
			if err := Rename(one, one+"-gone"); err != nil {
				t.Error(err)
			}
		})
	}
}

// A file system without project quotas, or one that only counts, is told by name.
func TestProbe(t *testing.T) {
	if err := Probe("/proc"); err == nil || !strings.Contains(err.Error(), "off, or the file system has none") {
		t.Errorf("proc: %v", err)
	}
	for _, fs := range fileSystems {
		at := mountNew(t, fs.name, fs.mkfs, "loop")
		if err := Probe(at); err == nil {
			t.Errorf("%s without prjquota is taken to enforce them", fs.name)
		} else {
			t.Logf("%s without prjquota: %v", fs.name, err)
		}
	}
}

// fill writes so many bytes, or what the kernel takes.
func fill(t *testing.T, path string, size int) (n int) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	defer withoutResource(t)()
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

// withoutResource takes CAP_SYS_RESOURCE from the thread, with which root passes limits on ext4. overlayfs writes
// without it for containers.
func withoutResource(t *testing.T) (restore func()) {
	t.Helper()
	runtime.LockOSThread()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var before, caps [2]unix.CapUserData
	err := unix.Capget(&header, &before[0])
	caps = before
	caps[0].Effective &^= 1 << unix.CAP_SYS_RESOURCE
	if err := errors.Join(err, unix.Capset(&header, &caps[0])); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := unix.Capset(&header, &before[0]); err != nil {
			t.Error(err)
		}
		runtime.UnlockOSThread()
	}
}
