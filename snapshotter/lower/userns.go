package lower

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// UserNamespace tells why a program in a user namespace of its own cannot mount an overlay over a container's files, as
// rootless builders in containers do; nil when it can. It tries in a private directory below parent, which it removes.
// f is what Examine has found there.
//
// A Go program has threads, so it cannot enter a user namespace itself: self makes a command that calls MountAsUser
// with these arguments.
func (f Features) UserNamespace(parent string, self func(args ...string) *exec.Cmd) (err error) {
	dir, release, err := ProbeDir(parent, ProbePrefix)
	if err != nil {
		return err
	}
	defer release()
	p := prober{dir: dir, payload: []byte(strings.Repeat("served from a pack", 100))}
	defer func() { err = errors.Join(err, p.close()) }()
	if err := p.write(); err != nil {
		return err
	}
	image, err := p.mount("private", f.Loop)
	if err != nil {
		return err
	}
	container, files, err := p.stack(Stack{Lower: []string{image}})
	if err != nil {
		return err
	}
	options, err := Kernel{Defaults: f.Defaults}.Overlay(container)
	if err != nil {
		return err
	}
	if err := unix.Mount("overlay", files, "overlay", 0, strings.Join(options, ",")); err != nil {
		return fmt.Errorf("mount a container's files: %w", err)
	}
	p.mounted = append(p.mounted, files)
	over, merged, err := p.stack(Stack{Lower: []string{files}})
	if err != nil {
		return err
	}
	cmd := self(files, over.Upper, over.Work, merged)
	// Owners stay what they are: whether these can be mapped is tried elsewhere (Features.IDMapped).
	same := []syscall.SysProcIDMap{{Size: 65536}}
	cmd.SysProcAttr = &unix.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS, UidMappings: same, GidMappings: same,
		GidMappingsEnableSetgroups: true, Pdeathsig: unix.SIGKILL,
	}
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Run(); err != nil {
		if text := strings.TrimSpace(said.String()); text != "" {
			return errors.New(text)
		}
		return fmt.Errorf("run a program in a user namespace: %w", err)
	}
	return nil
}

// MountAsUser mounts an overlay as a program in a user namespace does, writes to it, and reads the file below. The
// mount ends with the process's mount namespace.
func MountAsUser(lower, upper, work, merged string) error {
	options := "userxattr,lowerdir=" + lower + ",upperdir=" + upper + ",workdir=" + work
	if err := unix.Mount("overlay", merged, "overlay", 0, options); err != nil {
		return fmt.Errorf("mount an overlay in a user namespace: %w", err)
	}
	if _, err := os.ReadFile(filepath.Join(merged, "file")); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(merged, "new"), nil, 0o600)
}
