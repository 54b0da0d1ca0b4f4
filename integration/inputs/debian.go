package inputs

import (
	"archive/tar"
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

const (
	packages = "python3,ca-certificates"
	// recipe changes whenever the code below would make something else.
	recipe = "1"
)

//go:embed requirements.txt
var requirements string

// kit is what a Set is made of.
type kit struct {
	suite, python string // of Debian, and the Python that it brings
	requirements  string // pinned
	imports       string // a program that imports some of it
}

// Set is the cached inputs.
type Set struct {
	dir string
	say func(string)
	kit kit
}

// Open makes the cache's directory for Debian 12 with Python 3.11 and the packages of a large service. say may be
// nil.
func Open(say func(string)) (*Set, error) {
	return open(say, kit{"bookworm", "3.11", requirements, Imports})
}

// OpenNewer is Open for Debian 13 with Python 3.13 and a few packages.
func OpenNewer(say func(string)) (*Set, error) {
	few := "django==5.2.19\nasgiref==3.13.0\nsqlparse==0.6.1\nattrs==26.1.0\nrequests==2.34.2\nidna==3.20\n" +
		"certifi==2026.10.18\ncharset-normalizer==3.5.2\nurllib3\n"
	return open(say, kit{"trixie", "3.13", few, "import django.db.models, requests, attrs"})
}

// OpenOlder is Open for Debian 11 with Python 3.9, and no packages: App is not for it.
func OpenOlder(say func(string)) (*Set, error) {
	return open(say, kit{suite: "bullseye", python: "3.9"})
}

func open(say func(string), k kit) (*Set, error) {
	cache, err := node.CacheDir()
	if err != nil {
		return nil, err
	}
	if say == nil {
		say = func(string) {}
	}
	key := strings.Join([]string{recipe, k.suite, packages, k.requirements, pipVersion, runtime.GOARCH}, "\n")
	s := &Set{dir: filepath.Join(cache, "inputs", digest(key)), say: say, kit: k}
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return nil, fmt.Errorf("open inputs: %w", err)
	}
	return s, nil
}

// Debian returns the layer of a Debian root file system with Python.
func (s *Set) Debian(ctx context.Context) (*image.Layer, error) {
	return s.cached(ctx, "debian", func(ctx context.Context) (*image.Layer, error) {
		root, err := s.rootfs(ctx)
		if err != nil {
			return nil, err
		}
		s.say("packing the Debian layer")
		return image.FromDir(s.dir, image.LayerOptions{}, root, image.DirOptions{Map: func(h *tar.Header) bool {
			return !machineFile(h.Name)
		}})
	})
}

// machineFile reports whether debootstrap took a file from this machine, or left it
// behind for nobody's use.
func machineFile(name string) bool {
	switch name {
	case "etc/resolv.conf", "etc/hostname", "etc/apt/sources.list":
		return true
	}
	for _, dir := range []string{"var/cache/apt/", "var/lib/apt/lists/", "var/log/"} {
		if strings.HasPrefix(name, dir) && name != dir {
			return true
		}
	}
	return false
}

// rootfs makes the root file system; it is complete whenever it exists.
func (s *Set) rootfs(ctx context.Context) (string, error) {
	root := filepath.Join(s.dir, "rootfs")
	if _, err := os.Stat(root); err == nil {
		return root, nil
	}
	if err := node.Require(ctx, s.say, node.Debootstrap); err != nil {
		return "", err
	}
	s.say("making a Debian root file system with debootstrap (once)")
	staging := root + ".new"
	if err := os.RemoveAll(staging); err != nil {
		return "", fmt.Errorf("make rootfs: %w", err)
	}
	bin, err := node.LookPath("debootstrap")
	if err != nil {
		return "", fmt.Errorf("make rootfs: %w", err)
	}
	args := []string{"--variant=minbase", "--include=" + packages, s.kit.suite, staging}
	if mirror := os.Getenv("DEBIAN_MIRROR"); mirror != "" {
		args = append(args, mirror)
	}
	err = run(ctx, os.Environ(), bin, args...)
	if err != nil {
		// debootstrap leaves /proc mounted there when it is interrupted.
		return "", errors.Join(fmt.Errorf("make rootfs: %w", err), node.UnmountBelow(staging))
	}
	if err := os.Rename(staging, root); err != nil {
		return "", fmt.Errorf("make rootfs: %w", err)
	}
	return root, nil
}

func (s *Set) cached(ctx context.Context, name string, build func(context.Context) (*image.Layer, error)) (*image.Layer,
	error) {
	path := filepath.Join(s.dir, name+".json")
	if l, err := image.Load(s.dir, path); err == nil { // nobody who makes another one is waited for
		return l, nil
	}
	unlock, err := node.Lock(ctx, filepath.Join(s.dir, "lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()
	if l, err := image.Load(s.dir, path); err == nil {
		return l, nil
	}
	l, err := build(ctx)
	if err != nil {
		return nil, fmt.Errorf("make the layer %s: %w", name, err)
	}
	return l, l.Save(path)
}

// run runs a command and puts the end of its output into the error.
func run(ctx context.Context, env []string, bin string, args ...string) error {
	cmd := exec.CommandContext(ctx, bin, args...)
	cmd.Env = env
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		text := out.String()
		if len(text) > 4000 {
			text = "..." + text[len(text)-4000:]
		}
		return fmt.Errorf("%s: %w\n%s", filepath.Base(bin), err, text)
	}
	return nil
}
