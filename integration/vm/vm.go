package vm

import (
	"bytes"
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

//go:embed init.sh
var initScript string

// diskSize is the machine's disk; it is a sparse file.
const diskSize = 4 << 30

// Programs of the distribution that a machine is made with.
var (
	qemu      = node.Command{Name: "qemu-system-x86_64", Packages: "qemu-system-x86"}
	qemuArm   = node.Command{Name: "qemu-system-aarch64", Packages: "qemu-system-arm"}
	qemuPower = node.Command{Name: "qemu-system-ppc64", Packages: "qemu-system-ppc"}
	busybox   = node.Command{Name: "busybox", Packages: "busybox-static"}
	ext4      = node.Command{Name: "mkfs.ext4", Packages: "e2fsprogs"}
	btrfs     = node.Command{Name: "mkfs.btrfs", Packages: "btrfs-progs"}
	xz        = node.Command{Name: "xz", Packages: "xz-utils"}
)

// FS is a file system.
type FS string

const (
	Ext4  FS = "ext4" // with the feature verity
	Btrfs FS = "btrfs"
)

// Options describe one run.
type Options struct {
	// Dir is where the machine's files are made; empty.
	Dir    string
	Kernel Kernel
	FS     FS // of the disk
	// Files are put on the disk: path -> file here.
	Files map[string]string
	// Tree is a directory that the disk begins with a copy of; may be "".
	Tree string
	// Append is added to the kernel's command line.
	Append string
	// Disk is one that MakeDisk has made, for runs that go on with what an earlier one left; else one is made.
	Disk string
	// Sectors is the size of the disk's sectors in bytes; 0 is 512.
	Sectors int
	// Root: the disk becomes the root directory, as containers need it (pivot_root does not leave an initramfs).
	Root bool
	// Script is what busybox's shell runs there, with the disk as its directory.
	Script string
	// Output gets what the machine prints, as it comes; may be nil.
	Output io.Writer
}

// Require installs what Run needs for the kernel of a suite, or returns an error that wraps node.ErrMissing.
func Require(ctx context.Context, name string, say func(string)) error {
	if runtime.GOARCH != "amd64" {
		return fmt.Errorf("%w: a machine of type amd64", node.ErrMissing)
	}
	emulator := qemu
	switch _, _, arch := flavourOf(name); arch {
	case "arm64":
		emulator = qemuArm
	case "ppc64le":
		emulator = qemuPower
	}
	return node.Require(ctx, say, emulator, busybox, ext4, btrfs, xz)
}

// Run boots a machine, runs the script, and returns what was printed. The machine is gone then. A script that fails is
// an error.
func Run(ctx context.Context, opts Options) (string, error) {
	initrd, err := makeInitrd(ctx, opts)
	if err != nil {
		return "", err
	}
	disk := opts.Disk
	if disk == "" {
		if disk, err = MakeDisk(ctx, opts); err != nil {
			return "", err
		}
	}
	sectors := cmp.Or(opts.Sectors, 512)
	cmd, err := emulate(ctx, opts.Kernel, opts.Append, "-initrd", initrd,
		"-drive", "file="+disk+",if=none,id=disk,format=raw,cache=unsafe",
		"-device", fmt.Sprintf("virtio-blk-pci,drive=disk,logical_block_size=%d,physical_block_size=%[1]d", sectors))
	if err != nil {
		return "", err
	}
	// It must not outlive a test that dies.
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	runtime.LockOSThread() // whose end the kernel takes for the parent's
	defer runtime.UnlockOSThread()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if opts.Output != nil {
		cmd.Stdout = io.MultiWriter(&out, opts.Output)
	}
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("qemu: %w\n%s", err, errs.String())
	}
	text := strings.ReplaceAll(out.String(), "\r\n", "\n")
	if !strings.Contains(text, "\nvm: exit 0\n") {
		return text, errors.New("the script in the machine has failed, or did not come to its end")
	}
	return text, nil
}

// emulate is the command that boots a kernel. One CPU, since with two QEMU 7.2 may run a breakpoint that Linux has
// taken out again while it patched itself, and Linux dies of it (6.12: "Oops: int3"). Not KVM, which is there on some
// virtual machines and stops in the middle of the boot.
func emulate(ctx context.Context, k Kernel, line string, args ...string) (*exec.Cmd, error) {
	// cx16=off: QEMU 7.2 emulates cmpxchg16b wrongly, and Linux dies of it. no_timer_check: on a busy machine the timer
	// fails Linux's test.
	name, console := qemu.Name, "ttyS0 no_timer_check"
	machine := []string{"-machine", "q35", "-cpu", "max,cx16=off"}
	switch k.Arch {
	case "arm64":
		name, console = qemuArm.Name, "ttyAMA0"
		machine = []string{"-machine", "virt", "-cpu", "max,pauth-impdef=on"} // the real one's hashes take most of the time
	case "ppc64le":
		name, console = qemuPower.Name, "hvc0"
		machine = []string{"-machine", "pseries", "-cpu", "power9"}
	}
	bin, err := node.LookPath(name)
	if err != nil {
		return nil, err
	}
	return exec.CommandContext(ctx, bin, slices.Concat(machine, args, []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-accel", "tcg", "-smp", "1", "-m", "3G", "-serial", "stdio", "-kernel", k.Image,
		"-append", "quiet loglevel=4 panic=-1 " + line + " console=" + console,
	})...), nil
}

// makeInitrd packs busybox, the modules and init.
func makeInitrd(ctx context.Context, opts Options) (string, error) {
	root := filepath.Join(opts.Dir, "initrd")
	for _, dir := range []string{"bin", "modules"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return "", fmt.Errorf("make initrd: %w", err)
		}
	}
	order, err := opts.Kernel.copyModules(ctx, filepath.Join(root, "modules"),
		"crc32c_generic", // what the file systems ask for by another name
		"virtio_pci", "virtio_blk", "loop", "ext4", "btrfs", "xfs", "quota_v2", "overlay", "erofs")
	if err != nil {
		return "", fmt.Errorf("make initrd: %w", err)
	}
	bin, err := node.LookPath(busybox.Name)
	if err != nil {
		return "", fmt.Errorf("make initrd: %w", err)
	}
	its, err := opts.Kernel.Program(busybox.Name)
	if err != nil {
		return "", fmt.Errorf("make initrd: %w", err)
	}
	program, err := os.ReadFile(its)
	if err != nil {
		return "", fmt.Errorf("make initrd: %w", err)
	}
	files := map[string]string{
		"bin/busybox": string(program), "init": initScript, "script": opts.Script,
		"modules/order": strings.Join(order, "\n") + "\n", "modules/fs": string(opts.FS),
	}
	if opts.Root {
		files["modules/root"] = ""
	}
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(root, name), []byte(data), 0o755); err != nil {
			return "", fmt.Errorf("make initrd: %w", err)
		}
	}
	file := filepath.Join(opts.Dir, "initrd.img")
	pack := exec.CommandContext(ctx, bin, "sh", "-c", `cd "$1" && "$2" find . | "$2" cpio -o -H newc > "$3"`, "pack", root,
		bin, file)
	if out, err := pack.CombinedOutput(); err != nil {
		return "", fmt.Errorf("make initrd: %w\n%s", err, out)
	}
	return file, nil
}

// MakeDisk makes the file system with the files, in opts.Dir.
func MakeDisk(ctx context.Context, opts Options) (string, error) {
	from, file := filepath.Join(opts.Dir, "files"), filepath.Join(opts.Dir, "disk.img")
	if err := os.MkdirAll(from, 0o755); err != nil {
		return "", fmt.Errorf("make disk: %w", err)
	}
	if opts.Tree != "" {
		if out, err := exec.CommandContext(ctx, "cp", "-a", opts.Tree+"/.", from).CombinedOutput(); err != nil {
			return "", fmt.Errorf("make disk: %w\n%s", err, out)
		}
	}
	for name, path := range opts.Files {
		to := filepath.Join(from, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), link(path, to)); err != nil {
			return "", fmt.Errorf("make disk: %w", err)
		}
	}
	f, err := os.Create(file)
	if err == nil {
		err = errors.Join(f.Truncate(diskSize), f.Close())
	}
	if err != nil {
		return "", fmt.Errorf("make disk: %w", err)
	}
	command, args := ext4, []string{"-q", "-F", "-b", "4096", "-O", "verity", "-d", from, file}
	if opts.FS == Btrfs {
		command, args = btrfs, []string{"-q", "--rootdir", from, file}
	}
	bin, err := node.LookPath(command.Name)
	if err != nil {
		return "", fmt.Errorf("make disk: %w", err)
	}
	if out, err := exec.CommandContext(ctx, bin, args...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("make disk: %w\n%s", err, out)
	}
	return file, nil
}

// link makes a hard link, or a copy where the file is on another file system.
func link(from, to string) error {
	err := os.Link(from, to)
	if !errors.Is(err, unix.EXDEV) {
		return err
	}
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o755)
}
