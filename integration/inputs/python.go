package inputs

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

const (
	pipVersion = "26.3"
	// OtherOwner is the uid and gid of every file that the second pip run brought.
	OtherOwner = 1000
)

// Imports is a Python program that imports the packages of an app and prints the
// versions of some: what a demo container runs.
const Imports = `import sys, arroyo, celery, confluent_kafka, django, psycopg2, sentry_kafka_schemas
print("python", sys.version.split()[0], "django", django.__version__, "celery", celery.__version__,
      "confluent-kafka", confluent_kafka.version(), "psycopg2", psycopg2.__version__.split()[0])`

// App returns the layer of the n-th pip install, n being 1 or 2.
func (s *Set) App(ctx context.Context, n int) (*image.Layer, error) {
	name := fmt.Sprintf("app-%d", n)
	return s.cached(ctx, name, func(ctx context.Context) (*image.Layer, error) {
		base, err := s.rootfs(ctx)
		if err != nil {
			return nil, err
		}
		if err := s.download(ctx, "wheels", s.kit.requirements); err != nil {
			return nil, err
		}
		if n > 1 {
			if err := s.pause(ctx, n-1); err != nil {
				return nil, err
			}
		}
		in := install{name: name, packages: lines(s.kit.requirements), check: s.kit.imports}
		if n > 1 {
			in.owner = OtherOwner
		}
		return s.install(ctx, base, in)
	})
}

// pause waits until mtimes of a new install differ from those of an earlier one, which
// have whole seconds in an image.
func (s *Set) pause(ctx context.Context, earlier int) error {
	info, err := os.Stat(filepath.Join(s.dir, fmt.Sprintf("app-%d.json", earlier)))
	if err != nil {
		return nil // not made yet; it will come later, and so differ
	}
	select {
	case <-time.After(time.Until(info.ModTime().Add(2 * time.Second))):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// lines are the requirements in a text, without comments.
func lines(text string) (list []string) {
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			list = append(list, line)
		}
	}
	return list
}

// download fetches wheels for the root file system's Python with this machine's pip, into the
// directory name. Pinned requirements are all there is: pip resolves nothing.
func (s *Set) download(ctx context.Context, name, requirements string) error {
	wheels := filepath.Join(s.dir, name)
	if _, err := os.Stat(wheels); err == nil {
		return nil
	}
	if err := node.Require(ctx, s.say, node.Pip); err != nil {
		return err
	}
	s.say("downloading Python wheels (once)")
	staging := wheels + ".new"
	if err := os.MkdirAll(staging, 0o755); err != nil {
		return fmt.Errorf("download wheels: %w", err)
	}
	list := filepath.Join(s.dir, name+".txt")
	if err := os.WriteFile(list, []byte(requirements), 0o644); err != nil {
		return fmt.Errorf("download wheels: %w", err)
	}
	args := []string{"download", "--quiet", "--python-version", s.kit.python, "--implementation", "cp",
		"--only-binary=:all:", "--dest", staging, "--requirement", list, "pip==" + pipVersion, "--platform", "any"}
	arch := map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[runtime.GOARCH]
	for _, glibc := range []string{"_2_36", "_2_35", "_2_34", "_2_31", "_2_28", "_2_27", "_2_24", "_2_17", "2014", "_2_12",
		"2010", "_2_5", "1"} {
		args = append(args, "--platform", "manylinux"+glibc+"_"+arch)
	}
	pip, err := node.LookPath(node.Pip.Name)
	if err != nil {
		return fmt.Errorf("download wheels: %w", err)
	}
	if err := run(ctx, os.Environ(), pip, args...); err != nil {
		return fmt.Errorf("download wheels: %w", err)
	}
	if err := os.Rename(staging, wheels); err != nil {
		return fmt.Errorf("download wheels: %w", err)
	}
	return nil
}

// install is one run of pip.
type install struct {
	name     string
	packages []string // requirements
	owner    int      // of what it brings; 0 is root
	check    string   // a program that must run afterwards
}

// install runs pip inside an overlay on the root file system; what lands in the
// overlay's upper directory is the layer, as in a container build.
func (s *Set) install(ctx context.Context, base string, in install) (_ *image.Layer, err error) {
	name := in.name
	s.say("running pip install for " + name)
	work, err := os.MkdirTemp(s.dir, name+"-")
	if err != nil {
		return nil, fmt.Errorf("install: %w", err)
	}
	defer func() { err = errors.Join(err, node.UnmountBelow(work), os.RemoveAll(work)) }()
	sub := map[string]string{}
	for _, d := range []string{"upper", "work", "root"} {
		sub[d] = filepath.Join(work, d)
		if err := os.Mkdir(sub[d], 0o755); err != nil {
			return nil, fmt.Errorf("install: %w", err)
		}
	}
	opts := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", base, sub["upper"], sub["work"])
	if err := unix.Mount("overlay", sub["root"], "overlay", 0, opts); err != nil {
		return nil, fmt.Errorf("install: mount overlay: %w", err)
	}
	if err := s.pip(ctx, sub["root"], in); err != nil {
		return nil, err
	}
	if err := node.UnmountBelow(work); err != nil {
		return nil, err
	}
	s.say("packing the layer of " + name)
	return image.FromDir(s.dir, image.LayerOptions{}, sub["upper"], image.DirOptions{Map: func(h *tar.Header) bool {
		if strings.HasPrefix(h.Name, "tmp/") || strings.HasPrefix(h.Name, "root/") || strings.HasPrefix(h.Name, "mnt/") {
			return false
		}
		if in.owner > 0 && strings.HasPrefix(h.Name, "usr/local/") && !inBase(base, h.Name) {
			h.Uid, h.Gid = in.owner, in.owner
		}
		return true
	}})
}

func inBase(base, name string) bool {
	_, err := os.Lstat(filepath.Join(base, name))
	return err == nil
}

// pip runs the downloaded pip with the root's own Python, offline, and checks that
// what it installed can be imported there.
func (s *Set) pip(ctx context.Context, root string, in install) error {
	mnt := filepath.Join(root, "mnt")
	if err := unix.Mount(s.dir, mnt, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("install: bind wheels: %w", err)
	}
	env := []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8", "PIP_ROOT_USER_ACTION=ignore"}
	args := append([]string{root, "python3", "/mnt/" + Pip, "install",
		"--quiet", "--no-index", "--no-cache-dir", "--break-system-packages", "--no-deps", "--find-links", "/mnt/wheels",
		"--find-links", "/mnt/" + OlderWheels}, in.packages...)
	chroot, err := node.LookPath("chroot")
	if err != nil {
		return fmt.Errorf("install: %w", err)
	}
	if err := run(ctx, env, chroot, args...); err != nil {
		return fmt.Errorf("pip install: %w", err)
	}
	// -B: the check must not write compiled files that pip did not.
	if err := run(ctx, env, chroot, root, "python3", "-B", "-c", in.check); err != nil {
		return fmt.Errorf("import the installed packages: %w", err)
	}
	if err := unix.Unmount(mnt, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("install: %w", err)
	}
	return nil
}

func digest(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:6])
}
