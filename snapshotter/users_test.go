package snapshotter

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// ociClient is what containerd's options for specs ask.
type ociClient struct{ s *Snapshotter }

func (c ociClient) SnapshotService(string) snapshots.Snapshotter { return c.s }

// containerd looks users and groups up in a container's files without mounting them, also where the container has
// changed them.
func TestContainerdFindsUsers(t *testing.T) {
	s := open(t, t.TempDir())
	passwd := strings.Repeat("filler:x:9:9::/:/bin/sh\n", 100) // so that it lies in a pack
	name, _ := unpack(t, s, "one", "", layerTar(t, map[string]string{
		"etc/passwd": passwd + "alice:x:1001:1002::/:/bin/sh\n",
		"etc/group":  strings.Repeat("filler:x:9:\n", 100) + "staff:x:50:alice\n",
	}), nil)
	mounts, err := s.Prepare(t.Context(), "container", name)
	if err != nil || len(mounts) != 1 {
		t.Fatalf("%v, %v", mounts, err)
	}
	look := func(user string) (specs.User, error) {
		spec := &oci.Spec{Process: &specs.Process{}, Linux: &specs.Linux{}}
		c := &containers.Container{Snapshotter: "dedup", SnapshotKey: "container"}
		err := oci.WithUser(user)(t.Context(), ociClient{s}, c, spec)
		return spec.Process.User, err
	}
	if u, err := look("alice"); err != nil || u.UID != 1001 || u.GID != 1002 {
		t.Errorf("of the image: %+v, %v", u, err)
	}
	err = mount.WithTempMount(t.Context(), mounts, func(root string) error {
		etc := filepath.Join(root, "etc")
		return errors.Join(os.WriteFile(filepath.Join(etc, "passwd"), []byte(passwd+"bob:x:7:8::/:/bin/sh\n"), 0o644),
			os.Remove(filepath.Join(etc, "group")))
	})
	if err != nil {
		t.Fatal(err)
	}
	if u, err := look("bob"); err != nil || u.UID != 7 || u.GID != 8 {
		t.Errorf("of the container: %+v, %v", u, err)
	}
	if u, err := look("alice"); err == nil {
		t.Errorf("who is no more: %+v", u)
	}
	if u, err := look("bob:staff"); err == nil {
		t.Errorf("a group that is no more: %+v", u)
	}
}

// Whoever asks gets exactly one mount, of whatever kind of snapshot.
func TestExactlyOneMount(t *testing.T) {
	s, ctx := open(t, t.TempDir()), ns(t, "one")
	name, _ := unpack(t, s, "one", "", layerTar(t, map[string]string{"a": strings.Repeat("text", 1000)}), nil)
	for key, do := range map[string]func(string) ([]mount.Mount, error){
		"active":            func(key string) ([]mount.Mount, error) { return s.Prepare(ctx, key, name) },
		"active, no parent": func(key string) ([]mount.Mount, error) { return s.Prepare(ctx, key, "") },
		"view":              func(key string) ([]mount.Mount, error) { return s.View(ctx, key, name) },
		"view, no parent":   func(key string) ([]mount.Mount, error) { return s.View(ctx, key, "") },
		"extraction": func(key string) ([]mount.Mount, error) {
			labels := map[string]string{labelRef: "sha256:" + strings.Repeat("0", 64)}
			return s.Prepare(ctx, key, name, snapshots.WithLabels(labels))
		},
	} {
		first, err := do(key)
		if err != nil || len(first) != 1 {
			t.Errorf("%s: %v, %v", key, first, err)
		}
		again, err := s.Mounts(ctx, key)
		if err != nil || len(again) != 1 {
			t.Errorf("%s: Mounts: %v, %v", key, again, err)
		}
	}
}
