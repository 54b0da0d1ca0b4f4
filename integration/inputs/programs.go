package inputs

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// programs is where the programs and their libraries are in the layer; their names lead there from /usr/local/bin.
const programs = "opt/programs"

// npmPackages are what Node programs find in /opt/programs/node_modules.
const npmPackages = `{"private": true, "dependencies": {"tar": "7.4.3", "fs-extra": "7.0.1"},
"overrides": {"minipass": "7.1.3", "graceful-fs": "4.2.12"}}
`

// Programs returns a layer with this machine's Node, git and rsync, and with packages of npm. They bring their own
// libraries and loader, so it fits any root file system with a /bin/sh. say may be nil.
func Programs(ctx context.Context, say func(string)) (*image.Layer, error) {
	cache, err := node.CacheDir()
	if err != nil {
		return nil, err
	}
	if say == nil {
		say = func(string) {}
	}
	wanted := []node.Command{node.NodeJS, node.Git, node.Rsync}
	if err := node.Require(ctx, say, append(wanted, node.Npm)...); err != nil {
		return nil, err
	}
	key := "1\n" + npmPackages
	var paths []string
	for _, c := range wanted {
		path, err := node.LookPath(c.Name)
		if err != nil {
			return nil, fmt.Errorf("find %s: %w", c.Name, err)
		}
		fi, err := os.Stat(path)
		if err != nil {
			return nil, fmt.Errorf("find %s: %w", c.Name, err)
		}
		paths = append(paths, path)
		key += fmt.Sprintf("%s %d %d\n", path, fi.Size(), fi.ModTime().UnixNano())
	}
	s := &Set{dir: filepath.Join(cache, "inputs", "programs-"+digest(key)), say: say}
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return nil, fmt.Errorf("open inputs: %w", err)
	}
	return s.cached(ctx, "programs", func(ctx context.Context) (*image.Layer, error) { return s.programs(ctx, paths) })
}

func (s *Set) programs(ctx context.Context, paths []string) (_ *image.Layer, err error) {
	s.say("packing Node, git and rsync, and downloading packages with npm (once)")
	root, err := os.MkdirTemp(s.dir, "programs-")
	if err != nil {
		return nil, fmt.Errorf("pack programs: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(root)) }()
	for _, dir := range []string{"usr/local/bin", programs + "/bin", programs + "/lib"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return nil, fmt.Errorf("pack programs: %w", err)
		}
	}
	for _, path := range paths {
		if err := packProgram(ctx, root, path); err != nil {
			return nil, fmt.Errorf("pack %s: %w", path, err)
		}
	}
	top := filepath.Join(root, programs)
	if err := os.WriteFile(filepath.Join(top, "package.json"), []byte(npmPackages), 0o644); err != nil {
		return nil, fmt.Errorf("pack programs: %w", err)
	}
	npm, err := node.LookPath(node.Npm.Name)
	if err != nil {
		return nil, fmt.Errorf("find npm: %w", err)
	}
	err = run(ctx, os.Environ(), npm, "--prefix", top, "install", "--ignore-scripts", "--no-audit", "--no-fund")
	if err != nil {
		return nil, err
	}
	return image.FromDir(s.dir, image.LayerOptions{}, root, image.DirOptions{})
}

// packProgram copies a program with its libraries and its loader below root.
func packProgram(ctx context.Context, root, path string) error {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, "ldd", real).Output()
	if err != nil {
		return fmt.Errorf("ldd: %w", err)
	}
	loader := ""
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		fields := strings.Fields(lines.Text()) // name => path (address), or path (address) of the loader
		library := ""
		if len(fields) > 2 && fields[1] == "=>" {
			library = fields[2]
		} else if len(fields) > 0 && filepath.IsAbs(fields[0]) {
			library = fields[0]
			loader = filepath.Base(library)
		}
		if library == "" {
			continue // the kernel's
		}
		if err := copyTo(filepath.Join(root, programs, "lib", filepath.Base(library)), library); err != nil {
			return err
		}
	}
	if loader == "" {
		return errors.New("it is static, or ldd says nothing of its loader")
	}
	name := filepath.Base(path)
	if err := copyTo(filepath.Join(root, programs, "bin", name), real); err != nil {
		return err
	}
	script := fmt.Sprintf("#!/bin/sh\nexec /%[1]s/lib/%[2]s --library-path /%[1]s/lib /%[1]s/bin/%[3]s \"$@\"\n",
		programs, loader, name)
	return os.WriteFile(filepath.Join(root, "usr/local/bin", name), []byte(script), 0o755)
}

func copyTo(to, from string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o755)
}
