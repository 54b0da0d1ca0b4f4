package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// MkfsErofs returns the path of a mkfs.erofs that containerd's erofs differ accepts:
// one that reads tars in full mode, so 1.7 or later. It is the system's, or else the
// one that BuildErofs has made.
func MkfsErofs() (string, error) {
	if path, err := LookPath("mkfs.erofs"); err == nil && readsTars(path) {
		return path, nil
	}
	if dir, err := erofsDir(); err == nil {
		if path := filepath.Join(dir, "mkfs.erofs"); readsTars(path) {
			return path, nil
		}
	}
	return "", fmt.Errorf("%w: a mkfs.erofs that knows --tar (erofs-utils 1.7 or later), which containerd's erofs "+
		"differ runs", ErrMissing)
}

func readsTars(path string) bool {
	help, _ := exec.Command(path, "--help").CombinedOutput()
	return bytes.Contains(help, []byte("--tar="))
}

// erofsSuite is the Debian release whose erofs-utils BuildErofs takes: 1.8.6.
const erofsSuite = "trixie"

func erofsDir() (string, error) {
	cache, err := CacheDir()
	return filepath.Join(cache, "tools", "erofs-utils-"+erofsSuite), err
}

// BuildErofs returns the path of a usable mkfs.erofs. Where the system has none it takes
// that of a newer Debian with the libraries it needs and runs it with its own loader, so
// that nothing of this system is replaced (half a minute, once). say may be nil.
func BuildErofs(ctx context.Context, say func(string)) (string, error) {
	if path, err := MkfsErofs(); err == nil {
		return path, nil
	}
	dir, err := erofsDir()
	if err != nil {
		return "", err
	}
	if err := Require(ctx, say, Debootstrap); err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", fmt.Errorf("get mkfs.erofs: %w", err)
	}
	unlock, err := Lock(ctx, dir+".lock")
	if err != nil {
		return "", err
	}
	defer unlock()
	if path, err := MkfsErofs(); err == nil {
		return path, nil
	}
	if say != nil {
		say("getting mkfs.erofs from Debian " + erofsSuite + " with debootstrap (once)")
	}
	if err := fetchErofs(ctx, dir); err != nil {
		return "", fmt.Errorf("%w: mkfs.erofs 1.7 or later: %w", ErrMissing, err)
	}
	return MkfsErofs()
}

// fetchErofs makes a root file system, and keeps the program, its libraries and its loader.
func fetchErofs(ctx context.Context, dir string) (err error) {
	root, staging := dir+".root", dir+".new"
	if err := errors.Join(UnmountBelow(root), os.RemoveAll(root), os.RemoveAll(staging)); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, UnmountBelow(root), os.RemoveAll(root)) }()
	bin, err := LookPath(Debootstrap.Name)
	if err != nil {
		return err
	}
	args := []string{"--variant=minbase", "--include=erofs-utils", erofsSuite, root}
	if mirror := os.Getenv("DEBIAN_MIRROR"); mirror != "" {
		args = append(args, mirror)
	}
	if out, err := exec.CommandContext(ctx, bin, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("debootstrap: %w\n%s", err, tail(out, 20))
	}
	loaders, err := filepath.Glob(filepath.Join(root, "usr/lib/*/ld-linux-*.so.*"))
	if err != nil || len(loaders) == 0 {
		return fmt.Errorf("no loader in Debian %s: %w", erofsSuite, err)
	}
	program, libs := filepath.Join(root, "usr/bin/mkfs.erofs"), filepath.Dir(loaders[0])
	list, err := exec.CommandContext(ctx, loaders[0], "--library-path", libs, "--list", program).Output()
	if err != nil {
		return fmt.Errorf("list the libraries of mkfs.erofs: %w", err)
	}
	if err := os.Mkdir(staging, 0o755); err != nil {
		return err
	}
	keep := map[string]string{"program": program, "loader": loaders[0]}
	for field := range strings.FieldsSeq(string(list)) {
		if strings.HasPrefix(field, libs+"/") {
			keep[filepath.Base(field)] = field
		}
	}
	for name, from := range keep {
		data, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(staging, name), data, 0o755); err != nil {
			return err
		}
	}
	script := fmt.Sprintf("#!/bin/sh\nexec '%[1]s/loader' --library-path '%[1]s' '%[1]s/program' \"$@\"\n", dir)
	if err := os.WriteFile(filepath.Join(staging, "mkfs.erofs"), []byte(script), 0o755); err != nil {
		return err
	}
	return os.Rename(staging, dir)
}
