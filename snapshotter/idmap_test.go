package snapshotter

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func mapping(uids, gids string) snapshots.Opt {
	return snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotUIDMapping: uids, snapshots.LabelSnapshotGIDMapping: gids,
	})
}

func TestParseIDs(t *testing.T) {
	for text, ok := range map[string]bool{
		"0:100000:65536": true, "0:1:1,1:100000:65536": true, "5:1:1,0:100000:5": true,
		"": false, "0:1": false, "0:1:2:3": false, "0:1:0": false, "1:100000:65536": false, "0:-1:4": false,
		"0:4294967295:1": false, "0:1:4294967295": false, "0:1:1,": false, "0:1:1 ": false, "0:x:1": false,
	} {
		if _, err := parseIDs(text); (err == nil) != ok || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", text, err)
		}
	}
	list, err := parseIDs("0:1000:1,1:100000:10")
	if err != nil {
		t.Fatal(err)
	}
	for inside, want := range map[uint32]uint32{0: 1000, 1: 100000, 10: 100009, 11: 0} {
		if got, ok := toHost(list, inside); got != want || ok != (want != 0) {
			t.Errorf("%d is %d outside, want %d", inside, got, want)
		}
	}
}

// The names are those that containerd's client gives, in 2.x and before.
func TestIsRemapped(t *testing.T) {
	const parent = "sha256:6b2c2b8cd39eb9ab4ac8f56f9e2ec3fba10aa5b5d6bfb2f3c2d2b1cf2c8a5b0e"
	uids, gids := []idRange{{0, 100000, 65536}}, []idRange{{0, 200000, 65536}}
	other := "k8s.io/7/sha256:" + strings.Repeat("0", 64)
	if isRemapped(other, "k8s.io/3/"+parent, uids, gids) {
		t.Error("another name is taken for a remapped one")
	}
	sum := sha256.Sum256([]byte(`{"Parent":"` + parent + `","IDMap":{` +
		`"UidMap":[{"containerID":0,"hostID":100000,"size":65536}],` +
		`"GidMap":[{"containerID":0,"hostID":200000,"size":65536}]}}`))
	if !isRemapped("k8s.io/7/sha256:"+hex.EncodeToString(sum[:]), "k8s.io/3/"+parent, uids, gids) {
		t.Error("containerd 2's name is not known")
	}
	if !isRemapped("k8s.io/7/"+parent+"-100000-200000", "k8s.io/3/"+parent, uids, gids) {
		t.Error("containerd 1.7's name is not known")
	}
	if isRemapped("k8s.io/7/"+parent, "", uids, gids) {
		t.Error("a base layer is taken for a remapped one")
	}
}

// looksMapped mounts what base of TestMappedOwners has, and looks at owners.
func looksMapped(t *testing.T, mounts []mount.Mount) {
	t.Helper()
	owner := func(path string) (uint32, uint32) {
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			t.Fatal(err)
		}
		return st.Uid, st.Gid
	}
	if len(mounts) != 1 {
		t.Fatalf("%d mounts", len(mounts))
	}
	at := t.TempDir()
	if err := mount.All(mounts, at); err != nil {
		t.Fatalf("%v: %v", mounts, err)
	}
	defer func() {
		if err := mount.UnmountAll(at, 0); err != nil {
			t.Error(err)
		}
	}()
	if u, g := owner(at); u != 100000 || g != 200000 {
		t.Errorf("the root belongs to %d:%d", u, g)
	}
	if u, g := owner(filepath.Join(at, "owned")); u != 100007 || g != 200008 {
		t.Errorf("a file belongs to %d:%d", u, g)
	}
	if got, err := os.ReadFile(filepath.Join(at, "owned")); err != nil || string(got) != "owned" {
		t.Errorf("%q, %v", got, err)
	}
}

// A snapshot with a mapping is mounted as containerd does it: owners are mapped, below and in the upper directory.
func TestMappedOwners(t *testing.T) {
	s := open(t, t.TempDir())
	if s.kernel.NoIDMap != nil {
		t.Skip(s.kernel.NoIDMap)
	}
	ctx := t.Context()
	if _, err := s.Prepare(ctx, "made", ""); err != nil {
		t.Fatal(err)
	}
	mounts, err := s.Mounts(ctx, "made")
	if err != nil {
		t.Fatal(err)
	}
	upper, _ := s.upperOf(mounts)
	owned := filepath.Join(upper, "owned")
	err = errors.Join(os.WriteFile(owned, []byte("owned"), 0o640), os.Chown(owned, 7, 8), s.Commit(ctx, "base", "made"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, key := range []string{"one", "two", "view", "extract-1 x"} {
			if err := s.Remove(context.Background(), key); err != nil {
				t.Error(err)
			}
		}
	})
	ids := mapping("0:100000:65536", "0:200000:65536")
	for _, key := range []string{"one", "two"} {
		mounts, err := s.Prepare(ctx, key, "base", ids)
		if err != nil {
			t.Fatal(err)
		}
		looksMapped(t, mounts)
	}
	view, err := s.View(ctx, "view", "base", ids)
	if err != nil {
		t.Fatal(err)
	}
	looksMapped(t, view)
	// A client's change of its labels changes nothing.
	if _, err := s.Update(ctx, snapshots.Info{Name: "one", Labels: map[string]string{}}, "labels"); err != nil {
		t.Fatal(err)
	}
	mounts, err = s.Mounts(ctx, "one")
	if err != nil {
		t.Fatal(err)
	}
	looksMapped(t, mounts)
	if _, err := s.Prepare(ctx, "bad", "base", mapping("0:100000:65536", "rubbish")); !errdefs.IsInvalidArgument(err) {
		t.Errorf("rubbish: %v", err)
	}
	// A layer's labels can come from an image.
	layer, err := s.Prepare(ctx, "extract-1 x", "base", ids)
	if err != nil || strings.Contains(strings.Join(layer[0].Options, ","), "uidmap") {
		t.Errorf("an extraction is mapped: %v, %v", layer, err)
	}
	s.kernel.NoIDMap = errors.New("too old")
	_, err = s.Prepare(ctx, "no", "base", ids)
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "remap-ids") {
		t.Errorf("a kernel that cannot: %v", err)
	}
}
