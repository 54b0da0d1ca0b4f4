package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// selinuxPackages are the policy, and the commands of docs/selinux.md.
const selinuxPackages = "selinux-policy-default,policycoreutils,policycoreutils-python-utils,selinux-utils,runc"

// SELinuxTree makes a Debian of a suite with its policy for SELinux, once (150 MB).
func SELinuxTree(ctx context.Context, suite string, say func(string)) (dir string, err error) {
	if err := node.Require(ctx, say, node.Debootstrap); err != nil {
		return "", err
	}
	cache, err := node.CacheDir()
	if err != nil {
		return "", err
	}
	dir = filepath.Join(cache, "vm", suite+"-selinux")
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	unlock, err := node.Lock(ctx, dir+".lock")
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		return dir, err
	}
	say("making a Debian " + suite + " with SELinux's policy (once)")
	staging := dir + ".new"
	if err := errors.Join(node.UnmountBelow(staging), os.RemoveAll(staging)); err != nil {
		return "", err
	}
	bin, err := node.LookPath(node.Debootstrap.Name)
	if err != nil {
		return "", err
	}
	args := []string{"--variant=minbase", "--include=" + selinuxPackages, suite, staging}
	if mirror := os.Getenv("DEBIAN_MIRROR"); mirror != "" {
		args = append(args, mirror)
	}
	if out, err := exec.CommandContext(ctx, bin, args...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("debootstrap: %w\n%s", err, out[max(0, len(out)-4000):])
	}
	return dir, errors.Join(node.UnmountBelow(staging), os.RemoveAll(filepath.Join(staging, "var/cache/apt")),
		os.Rename(staging, dir))
}
