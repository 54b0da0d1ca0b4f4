package inputs

import (
	"archive/tar"
	"context"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// Busybox returns the entries of the smallest root file system with a shell. It is not
// cached, only the package is installed when missing.
func Busybox(ctx context.Context, say func(string)) ([]image.Entry, error) {
	command := node.Command{Name: "busybox", Packages: "busybox-static"}
	if err := node.Require(ctx, say, command); err != nil {
		return nil, err
	}
	path, err := node.LookPath(command.Name)
	if err != nil {
		return nil, fmt.Errorf("find busybox: %w", err)
	}
	if err := static(path); err != nil {
		return nil, err
	}
	binary, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read busybox: %w", err)
	}
	list, err := exec.CommandContext(ctx, path, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("list busybox's commands: %w", err)
	}
	entries := []image.Entry{
		image.Dir("bin"), image.Dir("dev"), image.Dir("etc"), image.Dir("proc"), image.Dir("root"), image.Dir("sys"),
		{Name: "tmp/", Type: tar.TypeDir, Mode: 0o1777},
		{Name: "bin/busybox", Content: string(binary), Mode: 0o755},
		image.File("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"),
		image.File("etc/group", "root:x:0:\n"),
	}
	for name := range strings.FieldsSeq(string(list)) {
		if name != "busybox" {
			entries = append(entries, image.Symlink("bin/"+name, "busybox"))
		}
	}
	return entries, nil
}

func static(path string) error {
	f, err := elf.Open(path)
	if err != nil {
		return fmt.Errorf("read busybox: %w", err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return fmt.Errorf("%w: a static busybox; %s is not: apt-get install busybox-static", node.ErrMissing, path)
		}
	}
	return nil
}
