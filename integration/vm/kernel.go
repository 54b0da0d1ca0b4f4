package vm

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// Suites of Debian whose kernels run. After the slash comes the flavour of the kernel, where it is not the one for
// clouds on amd64.
const (
	Bullseye = "bullseye" // Debian 11, Linux 5.10
	Bookworm = "bookworm" // Debian 12, Linux 6.1
	Trixie   = "trixie"   // Debian 13, Linux 6.12
	Sid      = "sid"      // unstable: about the newest Linux, another one every week

	TrixieArm    = "trixie/cloud-arm64"
	TrixieArm16K = "trixie/arm64-16k" // with pages of 16 KiB

	SidPower = "sid/powerpc64le-64k" // with pages of 64 KiB, which Debian has no kernel with for arm64

	// BookwormCoarse is Bookworm's kernel, but EROFS refuses blocks of 512 bytes as it did before 6.1.115. Debian has no
	// kernel any more that does so by itself.
	BookwormCoarse = Bookworm + coarseSuffix
	coarseSuffix   = "+coarse"
)

// Kernel is an unpacked kernel package.
type Kernel struct {
	// Arch is what Go calls the machine it is for.
	Arch    string
	Image   string // to boot
	modules string // a directory
	// root has programs for its machine, where that is not of this one's type.
	root string
	// coarse: EROFS is to refuse blocks that are smaller than a page.
	coarse bool
}

// Program is the path of a program for the kernel's machine: this machine's own, or one from Debian.
func (k Kernel) Program(name string) (string, error) {
	if k.Arch == runtime.GOARCH {
		return node.LookPath(name)
	}
	for _, dir := range []string{"bin", "sbin", "usr/bin", "usr/sbin"} {
		if path := filepath.Join(k.root, dir, name); isFile(path) {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s has no %s (remove it)", k.root, name)
}

func isFile(path string) bool {
	fi, err := os.Lstat(path)
	return err == nil && fi.Mode().IsRegular()
}

// flavourOf splits what a suite's constant says.
func flavourOf(name string) (suite, flavour, arch string) {
	name = strings.TrimSuffix(name, coarseSuffix)
	suite, flavour, found := strings.Cut(name, "/")
	switch {
	case !found:
		return suite, "cloud-amd64", "amd64"
	case strings.HasPrefix(flavour, "powerpc64le"):
		return suite, flavour, "ppc64le"
	}
	return suite, flavour, "arm64"
}

// debianArch is what Debian calls a machine.
func debianArch(arch string) string {
	if arch == "ppc64le" {
		return "ppc64el"
	}
	return arch
}

// Debian fetches the kernel of a suite with debootstrap, which verifies it, once (100 MB).
func Debian(ctx context.Context, name string, say func(string)) (k Kernel, err error) {
	if err := node.Require(ctx, say, node.Debootstrap); err != nil {
		return k, err
	}
	cache, err := node.CacheDir()
	if err != nil {
		return k, err
	}
	name, coarse := strings.CutSuffix(name, coarseSuffix)
	dir := filepath.Join(cache, "vm", strings.ReplaceAll(name, "/", "-"))
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return k, fmt.Errorf("get a kernel: %w", err)
	}
	unlock, err := node.Lock(ctx, dir+".lock")
	if err != nil {
		return k, err
	}
	defer unlock()
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		say("getting the kernel of Debian " + name + " (once)")
		if err := fetchKernel(ctx, name, dir); err != nil {
			return k, fmt.Errorf("get a kernel: %w", err)
		}
	}
	images, err := filepath.Glob(filepath.Join(dir, "boot/vmlinu[xz]-*"))
	newer, nerr := filepath.Glob(filepath.Join(dir, "usr/lib/modules/*/vmlinuz"))
	images = append(images, newer...)
	modules, merr := filepath.Glob(filepath.Join(dir, "usr/lib/modules/*"))
	older, oerr := filepath.Glob(filepath.Join(dir, "lib/modules/*"))
	modules = append(modules, older...)
	if err := errors.Join(err, nerr, merr, oerr); err != nil || len(images) != 1 || len(modules) != 1 {
		return k, fmt.Errorf("%s holds no kernel (remove it): %v", dir, err)
	}
	_, _, arch := flavourOf(name)
	return Kernel{Arch: arch, Image: images[0], modules: modules[0], root: dir, coarse: coarse}, nil
}

func fetchKernel(ctx context.Context, name, dir string) (err error) {
	suite, flavour, arch := flavourOf(name)
	// Newer suites have image and modules in packages of their own.
	include, packages := "linux-image-"+flavour, []string{"linux-[bim]"}
	if arch != runtime.GOARCH {
		include, packages = include+",busybox-static,runc", append(packages,
			"busybox-static_", "runc_", "libseccomp2_", "libc6_")
	}
	root, staging := dir+".root", dir+".new"
	if err := errors.Join(os.RemoveAll(root), os.RemoveAll(staging)); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, node.UnmountBelow(root), os.RemoveAll(root)) }()
	bin, err := node.LookPath(node.Debootstrap.Name)
	if err != nil {
		return err
	}
	args := []string{"--download-only", "--variant=minbase", "--include=" + include, "--arch=" + debianArch(arch), suite,
		root}
	if mirror := os.Getenv("DEBIAN_MIRROR"); mirror != "" {
		args = append(args, mirror)
	}
	if out, err := exec.CommandContext(ctx, bin, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("debootstrap: %w\n%s", err, out[max(0, len(out)-4000):])
	}
	var debs []string
	for _, pattern := range packages {
		found, err := filepath.Glob(filepath.Join(root, "var/cache/apt/archives", pattern+"*.deb"))
		if err != nil {
			return err
		}
		debs = append(debs, found...)
	}
	for _, deb := range debs {
		if out, err := exec.CommandContext(ctx, "dpkg-deb", "-x", deb, staging).CombinedOutput(); err != nil {
			return fmt.Errorf("unpack %s: %w\n%s", filepath.Base(deb), err, out)
		}
	}
	return os.Rename(staging, dir)
}

// copyModules puts modules and what they depend on into dir, and returns their files in the order to load them.
func (k Kernel) copyModules(ctx context.Context, dir string, names ...string) (order []string, err error) {
	files := map[string]string{}
	err = filepath.WalkDir(k.modules, func(path string, _ os.DirEntry, err error) error {
		name, ok := strings.CutSuffix(strings.TrimSuffix(filepath.Base(path), ".xz"), ".ko")
		if ok {
			files[strings.ReplaceAll(name, "-", "_")] = path
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list modules: %w", err)
	}
	done := map[string]bool{}
	var add func(name string) error
	add = func(name string) error {
		name = strings.ReplaceAll(name, "-", "_")
		if done[name] || files[name] == "" {
			return nil // what has no file is built in
		}
		done[name] = true
		module, err := readModule(ctx, files[name])
		if err != nil {
			return err
		}
		if k.coarse && name == "erofs" {
			if module, err = refuseSmallBlocks(module); err != nil {
				return fmt.Errorf("module %s: %w", name, err)
			}
		}
		needs, err := dependencies(module)
		if err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
		for _, n := range needs {
			if err := add(n); err != nil {
				return err
			}
		}
		order = append(order, name+".ko")
		return os.WriteFile(filepath.Join(dir, name+".ko"), module, 0o644)
	}
	for _, name := range names {
		if err := add(name); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// refuseSmallBlocks changes EROFS's check of a superblock, on amd64, from "blkszbits < 9 || blkszbits > PAGE_SHIFT" to
// "blkszbits != PAGE_SHIFT", as it was before Linux 6.4 and 6.1.115. The module loses its signature, which kernels do
// not insist on.
func refuseSmallBlocks(module []byte) ([]byte, error) {
	module = bytes.TrimSuffix(bytes.Clone(module), []byte("~Module signature appended~\n"))
	found := 0
	for i := 16; i < len(module); i++ {
		// cmp $3, and a far jump if that is less
		if !bytes.HasPrefix(module[i:], []byte("\x03\x0f\x87")) || module[i-2] != 0x80 || module[i-1] < 0xf8 {
			continue
		}
		for k := i - 16; k < i-2; k++ { // lea -9(blkszbits)
			if module[k] == 0x8d && module[k+1]>>6 == 1 && module[k+2] == 0xf7 {
				module[k+2], module[i] = 0xf4, 0 // -12, and $0
				found++
			}
		}
	}
	if found != 1 {
		return nil, fmt.Errorf("%d places look like the check of the size of blocks, want one", found)
	}
	return module, nil
}

// readModule reads a module, which newer suites have compressed.
func readModule(ctx context.Context, path string) ([]byte, error) {
	if !strings.HasSuffix(path, ".xz") {
		return os.ReadFile(path)
	}
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, "xz", "-dc", path)
	cmd.Stdout = &out
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("decompress module %s: %w", filepath.Base(path), err)
	}
	return out.Bytes(), nil
}

// dependencies reads a module's own list of the modules that it needs.
func dependencies(module []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("no .modinfo")
	}
	data, err := section.Data()
	if err != nil {
		return nil, err
	}
	for field := range strings.SplitSeq(string(data), "\x00") {
		if list, ok := strings.CutPrefix(field, "depends="); ok && list != "" {
			return strings.Split(list, ","), nil
		}
	}
	return nil, nil
}
