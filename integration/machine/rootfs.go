package machine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// suite is the Debian that the machine runs.
const suite = "bookworm"

// rootfs makes the machine's root file system in the cache, once (half a minute). It is complete whenever it exists.
func rootfs(ctx context.Context, say func(string)) (string, error) {
	if err := node.Require(ctx, say, node.Debootstrap); err != nil {
		return "", err
	}
	cache, err := node.CacheDir()
	if err != nil {
		return "", err
	}
	root := filepath.Join(cache, "machine", suite+"-"+strings.ReplaceAll(packages, ",", "+")+"-"+runtime.GOARCH)
	if err := os.MkdirAll(filepath.Dir(root), 0o755); err != nil {
		return "", fmt.Errorf("make the machine's root: %w", err)
	}
	unlock, err := node.Lock(ctx, root+".lock")
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(root); err == nil {
		return root, nil
	}
	if say != nil {
		say("making a Debian machine with debootstrap (once)")
	}
	staging := root + ".new"
	if err := os.RemoveAll(staging); err != nil {
		return "", fmt.Errorf("make the machine's root: %w", err)
	}
	bin, err := node.LookPath("debootstrap")
	if err != nil {
		return "", fmt.Errorf("make the machine's root: %w", err)
	}
	args := []string{"--variant=minbase", "--include=" + packages, suite, staging}
	if mirror := os.Getenv("DEBIAN_MIRROR"); mirror != "" {
		args = append(args, mirror)
	}
	if out, err := exec.CommandContext(ctx, bin, args...).CombinedOutput(); err != nil {
		return "", errors.Join(fmt.Errorf("make the machine's root: %w\n%s", err, out[max(0, len(out)-4000):]),
			node.UnmountBelow(staging))
	}
	if err := os.Rename(staging, root); err != nil {
		return "", fmt.Errorf("make the machine's root: %w", err)
	}
	return root, nil
}
