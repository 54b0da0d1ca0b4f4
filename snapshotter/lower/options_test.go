package lower

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
)

func TestOverlayOptions(t *testing.T) {
	shared := Stack{Lower: []string{"/c"}, Packs: []string{"/p/1", "/p/2"}, Upper: "/u", Work: "/w"}
	private := Stack{Lower: []string{"/c"}, Upper: "/u", Work: "/w"}
	for _, row := range []struct {
		name string
		k    Kernel
		s    Stack
		want []string
	}{
		{"private", Kernel{}, private, []string{"index=off", "workdir=/w", "upperdir=/u", "lowerdir=/c"}},
		{"private, other defaults", Kernel{Defaults: Defaults{Xino: true, Metacopy: true}}, private,
			[]string{"index=off", "redirect_dir=off,metacopy=off,xino=off", "workdir=/w", "upperdir=/u", "lowerdir=/c"}},
		{"private after metacopy", Kernel{Metacopy: true}, private,
			[]string{"index=off", "redirect_dir=on,metacopy=on", "workdir=/w", "upperdir=/u", "lowerdir=/c"}},
		{"mapped", Kernel{}, Stack{Lower: []string{"/c"}, Upper: "/u", Work: "/w", UIDs: "0:1:2", GIDs: "0:3:4"},
			[]string{"index=off", "uidmap=0:1:2", "gidmap=0:3:4", "workdir=/w", "upperdir=/u", "lowerdir=/c/."}},
		{"shared", Kernel{Shared: true}, shared, []string{"index=off", "upperdir=/u", "lowerdir=/c",
			"metacopy=off,redirect_dir=follow,lowerdir=/u:/c::/p/1::/p/2",
			"workdir=/w,metacopy=off,redirect_dir=follow,lowerdir=/c::/p/1::/p/2"}},
		{"shared with metacopy", Kernel{Shared: true, Metacopy: true}, shared, []string{"index=off",
			"upperdir=/u", "lowerdir=/c", "metacopy=on,redirect_dir=on,lowerdir=/u:/c::/p/1::/p/2",
			"workdir=/w,metacopy=on,redirect_dir=on,lowerdir=/c::/p/1::/p/2"}},
		{"shared view", Kernel{Shared: true}, Stack{Lower: []string{"/c"}, Packs: []string{"/p/1"}},
			[]string{"index=off", "lowerdir=/c", "metacopy=off,redirect_dir=follow,lowerdir=/c::/p/1"}},
	} {
		got, err := row.k.Overlay(row.s)
		if err != nil || !slices.Equal(got, row.want) {
			t.Errorf("%s: %q, %v", row.name, got, err)
		}
	}
	long := shared
	long.Packs = slices.Repeat([]string{"/" + strings.Repeat("p", 100)}, 20)
	if _, err := (Kernel{}).Overlay(long); !errors.Is(err, ErrTooLong) {
		t.Error(err)
	}
}

// asBuildKit is what BuildKit mounts in place of an overlay: it takes out redirect_dir=, and in what it only reads the
// upper directory is a lower one.
func asBuildKit(mounts []mount.Mount, readOnly bool) []mount.Mount {
	mounts = slices.Clone(mounts)
	upper, options := "", []string(nil)
	for _, o := range mounts[0].Options {
		dir, isUpper := strings.CutPrefix(o, "upperdir=")
		if isUpper {
			upper = dir
		}
		if strings.HasPrefix(o, "redirect_dir=") || readOnly && (isUpper || strings.HasPrefix(o, "workdir=")) {
			continue
		}
		options = append(options, o)
	}
	for i, o := range options {
		if dirs, ok := strings.CutPrefix(o, "lowerdir="); ok && readOnly && upper != "" {
			options[i] = "lowerdir=" + upper + ":" + dirs
		}
	}
	mounts[0].Options = append(options, "redirect_dir=off")
	return mounts
}
