package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedupctl/internal/doctor"
)

// disk returns the mount point of a new file system of 300 MB.
func disk(t *testing.T, mkfs string, options ...string) string {
	t.Helper()
	dir := t.TempDir()
	image, target := filepath.Join(dir, "image"), filepath.Join(dir, "fs")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 300<<20),
		os.Mkdir(target, 0o700)); err != nil {
		t.Fatal(err)
	}
	words := strings.Fields(mkfs)
	path, err := exec.LookPath(words[0])
	if err != nil {
		t.Skip("needs ", words[0])
	}
	if out, err := exec.Command(path, append(words[1:], image)...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", mkfs, err, out)
	}
	m := mount.Mount{Type: strings.TrimPrefix(filepath.Ext(words[0]), "."), Source: image,
		Options: append(options, "loop")}
	if err := m.Mount(target); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := mount.UnmountAll(target, 0); err != nil {
			t.Error(err)
		}
	})
	return target
}

func mounted(t *testing.T, fstype, options string) string {
	t.Helper()
	target := t.TempDir()
	if err := unix.Mount(fstype, target, fstype, 0, options); err != nil {
		t.Skipf("%s: %v", fstype, err)
	}
	t.Cleanup(func() { _ = unix.Unmount(target, unix.MNT_DETACH) })
	return target
}

// What doctor says of file systems that are no good, or not as good as others.
func TestDoctorDisks(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: it mounts file systems")
	}
	ctl := build(t)
	t.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	for _, row := range []struct {
		name string
		root func(t *testing.T) string
		want map[string]doctor.Severity
	}{
		{"ext4", func(t *testing.T) string { return disk(t, "mkfs.ext4 -q -F") },
			map[string]doctor.Severity{"disk.type": "ok", "disk.space": "ok", "disk.inodes": "ok",
				"disk.d_type": "ok", "disk.reflink": "info", "disk.quota": "info", "kernel.upper": "ok"}},
		{"xfs", func(t *testing.T) string {
			return disk(t, "mkfs.xfs -q -f")
		}, map[string]doctor.Severity{"disk.type": "ok", "disk.inodes": "ok", "disk.reflink": "ok"}},
		{"btrfs", func(t *testing.T) string {
			return disk(t, "mkfs.btrfs -q -f")
		}, map[string]doctor.Severity{"disk.type": "info", "disk.inodes": "ok", "disk.reflink": "ok"}},
		{"no inodes left", func(t *testing.T) string {
			return filled(t, disk(t, "mkfs.ext4 -q -F -N 64"), 4)
		}, map[string]doctor.Severity{"disk.inodes": "warning"}},
		{"no space left", func(t *testing.T) string {
			root := disk(t, "mkfs.ext4 -q -F")
			if err := os.WriteFile(root+"/ballast", make([]byte, 300<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
				t.Fatal(err)
			}
			return root
		}, map[string]doctor.Severity{"disk.space": "problem"}},
		{"entries without types", func(t *testing.T) string {
			return disk(t, "mkfs.ext4 -q -F -O ^filetype")
		}, map[string]doctor.Severity{"disk.d_type": "problem"}},
		{"read-only", func(t *testing.T) string {
			return disk(t, "mkfs.ext4 -q -F", "ro")
		}, map[string]doctor.Severity{"kernel.probe": "problem", "disk.writable": "problem"}},
		{"tmpfs", func(t *testing.T) string {
			return mounted(t, "tmpfs", "size=50m")
		}, map[string]doctor.Severity{"disk.type": "warning", "kernel.erofs": "info"}},
		{"overlayfs", func(t *testing.T) string {
			dirs := []any{t.TempDir(), t.TempDir(), t.TempDir()}
			return mounted(t, "overlay", fmt.Sprintf("lowerdir=%s,upperdir=%s/u,workdir=%[2]s/w", dirs[0],
				below(t, dirs[1].(string))))
		}, map[string]doctor.Severity{"disk.type": "warning", "kernel.upper": "problem"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			root := row.root(t)
			config := filepath.Join(t.TempDir(), "config.toml")
			text := fmt.Sprintf("root = %q\naddress = %q\ncontainerd_address = %q\nfidelity = \"exact\"\n", root, config+".sock",
				config+".none")
			if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(ctl, "doctor", "--json", "--config", config)
			out, err := cmd.Output()
			var d Diagnosis
			if err := json.Unmarshal(out, &d); err != nil || cmd.ProcessState.ExitCode() != exitDamage { // there is no daemon
				t.Fatal(err, string(out))
			}
			for check, severity := range row.want {
				found := false
				for _, f := range d.Findings {
					found = found || f.Check == check && f.Severity == severity && (severity == doctor.OK || severity == doctor.Info ||
						f.Remedy != "")
				}
				if !found {
					t.Errorf("%s is not %s: %v\n%s", check, severity, err, out)
				}
			}
			if left, err := filepath.Glob(filepath.Join(root, "probe-*")); err != nil || len(left) > 0 {
				t.Error(left, err)
			}
		})
	}
}

// filled leaves only so many inodes.
func filled(t *testing.T, root string, left uint64) string {
	t.Helper()
	for i := 0; ; i++ {
		var st unix.Statfs_t
		if err := unix.Statfs(root, &st); err != nil {
			t.Fatal(err)
		}
		if st.Ffree <= left {
			return root
		}
		if err := os.WriteFile(fmt.Sprintf("%s/%d", root, i), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// below makes the directories of an overlay.
func below(t *testing.T, dir string) string {
	t.Helper()
	if err := errors.Join(os.Mkdir(dir+"/u", 0o755), os.Mkdir(dir+"/w", 0o755)); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestDiagnosisText(t *testing.T) {
	var b strings.Builder
	writeDiagnosis(&b, diagnose([]doctor.Finding{
		{Check: "daemon.runs", Severity: doctor.OK, Message: "it runs"},
		{Check: "daemon.socket", Severity: doctor.Problem, Message: "bad\nrights", Remedy: "chmod"},
		{Check: "disk.type", Severity: doctor.Info, Message: "xfs"},
		{Check: "mounts.leaked", Severity: doctor.Warning, Message: "one", Remedy: "umount"},
	}, false))
	want := `daemon
  ok       it runs
  problem  bad
           rights
           > chmod

disk
  info     xfs

mounts
  warning  one
           > umount

1 problem, 1 warning
`
	if b.String() != want {
		t.Error(b.String())
	}
}
