package node

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// ErrMissing is wrapped by every error that says that this machine lacks something
// which cannot be installed here. Tests skip on it, and name it.
var ErrMissing = errors.New("missing on this machine")

// Command is a program of the distribution and the Debian packages that bring it.
type Command struct{ Name, Packages string }

// What the tests and the benchmark take from the distribution.
var (
	Runc        = Command{"runc", "runc"}
	Crun        = Command{"crun", "crun"}
	Debootstrap = Command{"debootstrap", "debootstrap debian-archive-keyring"}
	FsckErofs   = Command{"fsck.erofs", "erofs-utils"}
	Pip         = Command{"pip3", "python3-pip"}
	Igzip       = Command{"igzip", "isal"}
	NodeJS      = Command{"node", "nodejs"}
	Npm         = Command{"npm", "npm"}
	Git         = Command{"git", "git"}
	Rsync       = Command{"rsync", "rsync"}
)

// Require makes sure that commands are there: it installs the packages of those that
// are missing with apt-get, where that exists and we are root.
func Require(ctx context.Context, say func(string), commands ...Command) error {
	var packages, names []string
	for _, c := range commands {
		if _, err := LookPath(c.Name); err != nil {
			packages, names = append(packages, strings.Fields(c.Packages)...), append(names, c.Name)
		}
	}
	if len(packages) == 0 {
		return nil
	}
	return installPackages(ctx, say, strings.Join(names, ", "), packages...)
}

// installPackages installs Debian packages, of which want is what they bring.
func installPackages(ctx context.Context, say func(string), want string, packages ...string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%w: %s; as root: apt-get install %s", ErrMissing, want, strings.Join(packages, " "))
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("%w: %s, and there is no apt-get to install it with", ErrMissing, want)
	}
	cache, err := CacheDir()
	if err != nil {
		return err
	}
	unlock, err := Lock(ctx, filepath.Join(cache, "apt.lock"))
	if err != nil {
		return err
	}
	defer unlock()
	if say != nil {
		say("installing " + strings.Join(packages, " ") + " with apt-get")
	}
	install := append([]string{"install", "-y", "--no-install-recommends"}, packages...)
	if apt(ctx, install...) == nil {
		return nil
	}
	// A fresh image has no package lists yet.
	if err := apt(ctx, "update"); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrMissing, want, err)
	}
	if err := apt(ctx, install...); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrMissing, want, err)
	}
	return nil
}

func apt(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, "apt-get", append([]string{"-q"}, args...)...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("apt-get %s: %w\n%s", strings.Join(args, " "), err, tail(out.Bytes(), 20))
	}
	return nil
}

// LookPath is exec.LookPath that also looks where Debian keeps root's programs, which
// are not in everyone's PATH.
func LookPath(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil {
		return filepath.Abs(path)
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p, nil
		}
	}
	return "", err
}

func shortHash(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:6])
}

// tail returns the last n lines of text.
func tail(text []byte, n int) string {
	lines := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, "\n")
}
