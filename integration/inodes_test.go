package integration

import (
	"context"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/torture"
)

// identity is what programs tell files apart by.
type identity struct{ Dev, Ino uint64 }

// identities are those of everything below a root, directories apart: overlayfs numbers these anew at every mount.
type identities struct{ files, dirs map[string]identity }

func identify(t *testing.T, root string) identities {
	t.Helper()
	found := identities{map[string]identity{}, map[string]identity{}}
	must(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		into := found.files
		if d.IsDir() {
			into = found.dirs
		}
		into[strings.TrimPrefix(path, root)] = identity{st.Dev, st.Ino}
		return nil
	}))
	return found
}

// all has the files and the directories.
func (i identities) all() map[string]identity {
	all := maps.Clone(i.files)
	maps.Copy(all, i.dirs)
	return all
}

// numbers are the files' inode numbers without their device, which is another one at every mount.
func (i identities) numbers() map[string]uint64 {
	numbers := map[string]uint64{}
	for name, id := range i.files {
		numbers[name] = id.Ino
	}
	return numbers
}

// names are the names of each file that has several, as programs find them: by equal identities.
func (i identities) names() []string {
	names := map[identity][]string{}
	for name, id := range i.all() {
		names[id] = append(names[id], name)
	}
	var groups []string
	for _, group := range names {
		if len(group) > 1 {
			slices.Sort(group)
			groups = append(groups, strings.Join(group, " "))
		}
	}
	slices.Sort(groups)
	return groups
}

// fit checks that numbers can be held by programs that keep them in 32 bits; that they can be held by a double
// follows.
func (i identities) fit(t *testing.T) {
	t.Helper()
	for name, id := range i.all() {
		if id.Ino >= 1<<32 {
			t.Fatalf("%s has the inode number %d", name, id.Ino)
		}
	}
}

// debian is a root file system with the usual programs in it.
func debian(t *testing.T) *image.Layer {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: debootstrap and chroot do")
	}
	set, err := inputs.Open(func(text string) { t.Log(text) })
	must(t, err)
	l, err := set.Debian(testContext(t))
	must(t, err)
	return l
}

// Inode numbers are small, tell apart the files that overlayfs tells apart and no others, and stay: over remounts,
// copies up and restarts. Programs that rest on them do what they do with overlayfs.
func TestInodes(t *testing.T) {
	t.Parallel()
	usual := debian(t)
	programs, err := inputs.Programs(testContext(t), func(text string) { t.Log(text) })
	must(t, err)
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	tortured := []*image.Layer{busybox(t)}
	for _, l := range torture.Layers() {
		tortured = append(tortured, layer(t, l.Entries...))
	}
	for _, row := range []struct {
		name   string
		layers []*image.Layer
		change []string // files that a container changes, with one name each
		linked string   // one with several
	}{
		{"torture", tortured,
			[]string{"/kinds/size-1", "/kinds/size-65537", "/bin/busybox", "/meta/user-long"}, "/kinds/hard-2"},
		{"debian", []*image.Layer{usual, programs, linkedLayer(t), repositoryLayer(t)},
			[]string{"/etc/passwd", "/bin/bash"}, "/usr/bin/perl"},
	} {
		ref := pushDemo(t, r, row.name+":1", row.layers...)
		for _, snapshotter := range []string{"overlayfs", node.Snapshotter} {
			pull(t, n, snapshotter, ref)
		}
		t.Run(row.name, func(t *testing.T) {
			want, got := identifyView(t, n, "overlayfs", ref), identifyView(t, n, node.Snapshotter, ref)
			if len(want.names()) == 0 {
				t.Fatal("the image has no hard links: nothing was compared")
			}
			got.fit(t)
			if diff := cmp.Diff(want.names(), got.names()); diff != "" {
				t.Errorf("names of one file in a view (-overlayfs +dedup):\n%s", diff)
			}
			numbersStay(t, n, ref, want, row.change, row.linked)
		})
	}
	t.Run("programs", func(t *testing.T) { runPrograms(t, n, r.Ref("debian:1")) })
}

func identifyView(t *testing.T, n *node.Node, snapshotter, ref string) (found identities) {
	t.Helper()
	must(t, n.View(testContext(t), snapshotter, ref, func(root string) error { found = identify(t, root); return nil }))
	return found
}

// numbersStay changes files in a container's snapshot, mounts it again, and restarts the daemon between.
func numbersStay(t *testing.T, n *node.Node, ref string, want identities, change []string, linked string) {
	ctx := namespaces.WithNamespace(testContext(t), node.Namespace)
	chain, err := n.ChainID(ctx, ref)
	must(t, err)
	sn, key := n.Client().SnapshotService(node.Snapshotter), node.NewID("numbers")
	ctx, done, err := n.Client().WithLease(ctx)
	must(t, err)
	t.Cleanup(func() { must(t, done(context.WithoutCancel(ctx))) })
	_, err = sn.Prepare(ctx, key, chain)
	must(t, err)
	var first, changed identities
	again := func(look func(root string)) {
		t.Helper()
		mounts, err := sn.Mounts(ctx, key)
		must(t, err)
		must(t, n.WithMounts(mounts, func(root string) error {
			look(root)
			return nil
		}))
	}
	same := func(what string, want, got identities) {
		t.Helper()
		got.fit(t)
		if diff := cmp.Diff(want.numbers(), got.numbers()); diff != "" {
			t.Errorf("numbers %s (-before +after):\n%s", what, diff)
		}
	}
	again(func(root string) {
		first = identify(t, root)
		first.fit(t)
		if diff := cmp.Diff(want.names(), first.names()); diff != "" {
			t.Errorf("names of one file (-overlayfs +dedup):\n%s", diff)
		}
		for _, name := range change {
			must(t, os.Chmod(filepath.Join(root, name), 0o4755))
			f, err := os.OpenFile(filepath.Join(root, name), os.O_WRONLY|os.O_APPEND, 0)
			must(t, err)
			_, err = fmt.Fprint(f, "changed")
			must(t, err)
			must(t, f.Close())
		}
		changed = identify(t, root)
		if diff := cmp.Diff(first.all(), changed.all()); diff != "" {
			t.Errorf("copying files up changes identities:\n%s", diff)
		}
		// With index=off, as containerd has it too, a name of several gets a file of its own when it is copied up.
		must(t, os.Chmod(filepath.Join(root, linked), 0o700))
		must(t, os.Mkdir(filepath.Join(root, "new"), 0o755))
		for i := range 200 {
			must(t, os.WriteFile(filepath.Join(root, "new", fmt.Sprint(i)), nil, 0o644))
		}
		changed = identify(t, root)
		for _, group := range changed.names() {
			if strings.Contains(group, "/new") || strings.Contains(group, linked+" ") {
				t.Errorf("equal numbers: %s", group)
			}
		}
	})
	again(func(root string) { same("after a remount", changed, identify(t, root)) })
	must(t, n.StopDaemon())
	must(t, node.UnmountBelow(filepath.Join(n.Dir(), "run")))
	must(t, n.StartDaemon(ctx))
	again(func(root string) { same("after a restart without mounts", changed, identify(t, root)) })
}
