package integration

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/rootfs"
)

var (
	umoci   = node.Command{Name: "umoci", Packages: "umoci"}
	buildah = node.Command{Name: "buildah", Packages: "buildah"}
)

// Images as other tools write them: their tars, compressions, media types and ideas of
// a directory's changes.
func TestEqualityOtherTools(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it unpacks a Debian root file system")
	}
	slice := debianSlice(t)
	ignore := comparison{ignore: noRootTime}
	t.Run("umoci", func(t *testing.T) {
		t.Parallel()
		img := umociImage(t, slice)
		r := startRegistry(t)
		ref := pushImage(t, r, "tools/umoci:1", img)
		// umoci leaves unchanged parents out of a layer, and overlayfs shows those as new.
		described := directoryTimes(t, img)
		spec := comparison{ignore: ignore.ignore, correct: func(tree rootfs.Tree) {
			for path, e := range tree {
				if mtime, ok := described[path]; ok && e.Type == "dir" {
					change(tree, path, func(e *rootfs.Entry) { e.MTime = mtime })
				}
			}
		}}
		equality(t, startDedup(t, exact), ref, spec, node.Snapshotter, "overlayfs")
	})
	t.Run("buildah", func(t *testing.T) {
		t.Parallel()
		r := startRegistry(t)
		ref := r.Ref("tools/buildah:1")
		buildahImage(t, slice, ref)
		equality(t, startDedup(t, exact), ref, ignore, node.Snapshotter, "overlayfs")
	})
	t.Run("crane", func(t *testing.T) {
		t.Parallel()
		crane, err := node.BuildCrane(testContext(t), func(text string) { t.Log(text) })
		must(t, err)
		r := startRegistry(t)
		appended, flat := r.Ref("tools/crane:appended"), r.Ref("tools/crane:flat")
		more := tarFile(t, image.Dir("etc"), image.File("etc/.wh.passwd", ""), image.File("etc/group", "other\n"),
			image.Hardlink("etc/group-2", "etc/group"), image.Dir("usr"), image.File("usr/.wh.bin", ""))
		sh(t, crane, "append", "--insecure", "--new_layer", slice, "--new_layer", more, "--new_tag", appended)
		sh(t, crane, "flatten", "--insecure", "--tag", flat, appended)
		n := startDedup(t, exact)
		equality(t, n, appended, ignore, node.Snapshotter, "overlayfs")
		equality(t, n, flat, ignore, node.Snapshotter, "overlayfs")
	})
}

// directoryTimes are the mtimes that the topmost entries of an image's directories have.
func directoryTimes(t *testing.T, img v1.Image) map[string]time.Time {
	t.Helper()
	layers, err := img.Layers()
	must(t, err)
	times := map[string]time.Time{}
	for _, l := range layers {
		r, err := l.Uncompressed()
		must(t, err)
		for tr := tar.NewReader(r); ; {
			h, err := tr.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			must(t, err)
			if h.Typeflag == tar.TypeDir {
				times[filepath.Clean(strings.TrimPrefix(h.Name, "/"))] = h.ModTime.UTC()
			}
		}
		must(t, r.Close())
	}
	delete(times, ".") // containerd decides
	return times
}

// debianSlice is a tar of some directories of the demo's Debian, small enough to be
// packed over and over.
func debianSlice(t *testing.T) string {
	t.Helper()
	set, err := inputs.Open(func(text string) { t.Log(text) })
	must(t, err)
	debian, err := set.Debian(testContext(t))
	must(t, err)
	r, err := debian.Uncompressed()
	must(t, err)
	defer r.Close()
	path := filepath.Join(t.TempDir(), "slice.tar")
	f, err := os.Create(path)
	must(t, err)
	defer f.Close()
	n, err := copySlice(f, r)
	must(t, err)
	if n < 1000 {
		t.Fatalf("the slice of Debian has only %d members", n)
	}
	return path
}

func copySlice(w io.Writer, r io.Reader) (int, error) {
	tw, n := tar.NewWriter(w), 0
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return n, tw.Close()
		}
		if err != nil {
			return n, err
		}
		if !inSlice(h.Name) || h.Typeflag == tar.TypeLink && !inSlice(h.Linkname) {
			continue
		}
		n++
		if err := tw.WriteHeader(h); err != nil {
			return n, err
		}
		if _, err := io.Copy(tw, tr); err != nil {
			return n, err
		}
	}
}

func inSlice(name string) bool {
	for _, dir := range []string{"etc/", "usr/bin/", "usr/lib/python3/", "usr/share/perl5/", "var/", "bin", "lib"} {
		if strings.HasPrefix(name, dir) || strings.HasPrefix(dir, name) {
			return true
		}
	}
	return false
}

// umociImage is repacked layer by layer from an unpacked bundle.
func umociImage(t *testing.T, slice string) v1.Image {
	t.Helper()
	must(t, node.Require(testContext(t), func(text string) { t.Log(text) }, umoci))
	dir := t.TempDir()
	repo, bundle := filepath.Join(dir, "layout"), filepath.Join(dir, "bundle")
	root := filepath.Join(bundle, "rootfs")
	sh(t, "umoci", "init", "--layout", repo)
	sh(t, "umoci", "new", "--image", repo+":image")
	sh(t, "umoci", "unpack", "--image", repo+":image", bundle)
	sh(t, "tar", "-xpf", slice, "--numeric-owner", "-C", root)
	sh(t, "umoci", "repack", "--refresh-bundle", "--image", repo+":image", bundle)
	modify(t, root)
	sh(t, "umoci", "repack", "--refresh-bundle", "--image", repo+":image", bundle)
	modifyAgain(t, root)
	sh(t, "umoci", "repack", "--image", repo+":image", bundle)
	sh(t, "umoci", "insert", "--opaque", "--image", repo+":image", filepath.Join(root, "new"), "/usr/share/perl5")
	sh(t, "umoci", "insert", "--whiteout", "--image", repo+":image", "/etc/hosts.deny")

	path, err := layout.FromPath(repo)
	must(t, err)
	index, err := path.ImageIndex()
	must(t, err)
	manifest, err := index.IndexManifest()
	must(t, err)
	for _, m := range manifest.Manifests {
		if m.Annotations["org.opencontainers.image.ref.name"] == "image" {
			img, err := index.Image(m.Digest)
			must(t, err)
			return img
		}
	}
	t.Fatal("umoci left no image in its layout")
	return nil
}

// buildahImage is committed from a container's overlay or copy, and pushed to ref.
func buildahImage(t *testing.T, slice, ref string) {
	t.Helper()
	must(t, node.Require(testContext(t), func(text string) { t.Log(text) }, buildah))
	dir := t.TempDir()
	policy := filepath.Join(dir, "policy.json")
	must(t, os.WriteFile(policy, []byte(`{"default": [{"type": "insecureAcceptAnything"}]}`), 0o644))
	run := func(command string, args ...string) string {
		all := []string{"--root", dir + "/root", "--runroot", dir + "/run", "--storage-driver", "vfs", command}
		return strings.TrimSpace(sh(t, "buildah", append(all, args...)...))
	}
	t.Cleanup(func() { _ = node.UnmountBelow(dir) })
	container := run("from", "scratch")
	run("add", container, slice, "/")
	run("commit", "--signature-policy", policy, "--format", "docker", container, "first")
	second := run("from", "--signature-policy", policy, "--pull-never", "first")
	root := run("mount", second)
	modify(t, root)
	run("umount", second)
	run("commit", "--signature-policy", policy, "--format", "oci", second, "second")
	run("push", "--signature-policy", policy, "--tls-verify=false", "second", "docker://"+ref)
}

// modify deletes, replaces and changes what a slice of Debian has. The directory that a
// file takes the place of is empty: of any other, umoci 0.4 writes whiteouts below the file,
// and containerd's applier refuses those.
func modify(t *testing.T, root string) {
	t.Helper()
	in := func(name string) string { return filepath.Join(root, name) }
	long := strings.Repeat("long", 60)
	must(t, errors.Join(
		os.Remove(in("etc/passwd")),
		os.RemoveAll(in("usr/share/perl5/Debconf")),
		os.RemoveAll(in("var/lib/dpkg")),
		os.Remove(in("var/opt")),
		os.WriteFile(in("var/opt"), []byte("a directory was here"), 0o600),
		os.Remove(in("etc/group")),
		os.Mkdir(in("etc/group"), 0o2755),
		os.Mkdir(in("new"), 0o1777),
		os.WriteFile(in("new/"+long), []byte("long"), 0o644),
		os.WriteFile(in("new/setuid"), []byte("s"), 0o755),
		os.Chown(in("new/setuid"), 70000, 5),
		os.Chmod(in("new/setuid"), 0o755|os.ModeSetuid),
		unix.Setxattr(in("new/setuid"), "user.colour", []byte("blue"), 0),
		os.Link(in("new/"+long), in("new/hard")),
		os.Symlink("../etc", in("new/link")),
		unix.Mkfifo(in("new/fifo"), 0o600),
		unix.Mknod(in("new/device"), unix.S_IFBLK|0o640, int(unix.Mkdev(8, 1))),
		os.Chown(in("usr/bin/env"), 12, 34),
		os.Chmod(in("etc"), 0o711),
		os.Chtimes(in("usr/bin/tar"), time.Unix(1e9, 123456789), time.Unix(1e9, 123456789)),
	))
}

// modifyAgain changes what modify made.
func modifyAgain(t *testing.T, root string) {
	t.Helper()
	in := func(name string) string { return filepath.Join(root, name) }
	must(t, errors.Join(
		os.Remove(in("etc/group")),
		os.WriteFile(in("etc/group"), []byte("a file again"), 0o640),
		os.Remove(in("var/opt")),
		os.Mkdir(in("var/opt"), 0o755),
		os.Mkdir(in("var/lib/dpkg"), 0o755),
		os.WriteFile(in("var/lib/dpkg/status"), nil, 0o644),
		os.Remove(in("new/hard")),
		os.Remove(in("new/link")),
		os.Mkdir(in("new/link"), 0o755),
	))
}

// tarFile is a tar of entries in a file of its own.
func tarFile(t *testing.T, entries ...image.Entry) string {
	t.Helper()
	var buf bytes.Buffer
	must(t, image.WriteEntries(&buf, entries))
	path := filepath.Join(t.TempDir(), "more.tar")
	must(t, os.WriteFile(path, buf.Bytes(), 0o644))
	return path
}

// sh runs a command and returns its standard output.
func sh(t *testing.T, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(testContext(t), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		must(t, fmt.Errorf("%s %s: %w\n%s", filepath.Base(name), strings.Join(args, " "), err, errOut.String()))
	}
	return out.String()
}
