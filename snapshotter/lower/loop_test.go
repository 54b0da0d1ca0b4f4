package lower

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/content/erofs"
)

// withDev runs do with a /dev of its own that has the loop control device and nothing else, or not even that.
func withDev(t *testing.T, control bool, do func() error) error {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and the thread ends with its mounts
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
				return err
			}
			err := errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
				unix.Mount("tmpfs", "/dev", "tmpfs", 0, ""))
			if err == nil && control {
				err = unix.Mknod(loopControl, unix.S_IFCHR|0o600, int(unix.Mkdev(10, 237)))
			}
			return errors.Join(err, do())
		}()
	}()
	return <-done
}

// Where loop devices run out, the error says so and what to do, blames neither the disk nor the image, and leaves
// nothing behind. Once there are some again, the same image mounts.
func TestLoopDevicesRunOut(t *testing.T) {
	needsMounts(t)
	p := prober{dir: t.TempDir(), payload: []byte(strings.Repeat("payload", 200))}
	t.Cleanup(func() { _ = p.close() })
	if err := p.write(); err != nil {
		t.Fatal(err)
	}
	if _, err := p.mount("private", true); err != nil {
		t.Skip(err)
	}
	for _, row := range []struct {
		name    string
		control bool
		hint    string
	}{{"no control device", false, "modprobe loop"}, {"no devices", true, "give the daemon the host's /dev"}} {
		t.Run(row.name, func(t *testing.T) {
			for kind, mount := range map[string]func(at string) error{
				"chain image": func(at string) error {
					packs := func(content.PackID) string { return p.path("pack") }
					return mountImage(p.path("private"), at, []erofs.Device{p.packs[false]}, packs, loops)
				},
				"pack": func(at string) error { return mountPack(p.path("pack"), at, p.packs[false], true) },
			} {
				at := t.TempDir()
				err := withDev(t, row.control, func() error { return mount(at) })
				if !errors.Is(err, errNoLoop) || !strings.Contains(err.Error(), row.hint) || !strings.Contains(err.Error(), p.dir) {
					t.Errorf("%s: %v", kind, err)
				}
				if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOSPC) {
					t.Errorf("%s: it looks like something else: %v", kind, err)
				}
				if isErofs(at) {
					t.Errorf("%s: mounted all the same", kind)
				}
			}
		})
	}
	if at, err := p.mount("private", true); err != nil || p.check(at) != nil {
		t.Errorf("with loop devices again: %v", err)
	}
}

// Each way in which the kernel refuses a loop device has its word.
func TestExplainLoop(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for cause, hint := range map[unix.Errno]string{
		unix.ENOSPC: "no more of them", unix.ENOMEM: "no more of them", unix.EBUSY: "no more of them",
		unix.EPERM: "may not use them", unix.EACCES: "may not use them",
		unix.ENXIO: "/dev shows no more", unix.EIO: "losetup -a",
	} {
		err := explainLoop(f, fmt.Errorf("open /dev/loop9: %w", cause))
		if !errors.Is(err, errNoLoop) || errors.Is(err, cause) || !strings.Contains(err.Error(), hint) {
			t.Errorf("%v: %v", cause, err)
		}
	}
}

// A daemon that is killed with a loop device that is not mounted yet leaves none.
func TestLoopGoesWithKilledProcess(t *testing.T) {
	needsMounts(t)
	if path := os.Getenv("TEST_LOOP_OVER"); path != "" { // the process that is killed
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		own, err := newLoop(f, unix.LoopConfig{})
		if err != nil {
			t.Fatal(err)
		}
		pack, err := packLoop(f, 1, loops)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Println("attached", own.Name(), pack.Name())
		time.Sleep(time.Hour) // a select without cases ends a program without cgo: "all goroutines are asleep"
	}
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	over := func() (n int) {
		files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			if b, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(b)) == path {
				n++
			}
		}
		return n
	}
	cmd := exec.Command(os.Args[0], "-test.run", "^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), "TEST_LOOP_OVER="+path)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if !strings.HasPrefix(line, "attached ") {
		_, _ = cmd.Process.Kill(), cmd.Wait()
		t.Skipf("no loop devices here: %s, %v", line, err)
	}
	if n := over(); n != 2 {
		t.Errorf("%d loop devices, want 2", n)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait()
	for deadline := time.Now().Add(time.Minute); over() > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d loop devices are left", over())
		}
	}
}
