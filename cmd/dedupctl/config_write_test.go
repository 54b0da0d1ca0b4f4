package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// build makes the real binary.
func build(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "dedupctl")
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", path, ".")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return path
}

// openTerminal returns both ends of a pseudo terminal.
func openTerminal(t *testing.T) (ours, its *os.File) {
	t.Helper()
	ours, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skip("needs pseudo terminals: ", err)
	}
	t.Cleanup(func() { ours.Close() })
	n, err := unix.IoctlGetInt(int(ours.Fd()), unix.TIOCGPTN)
	if err := errors.Join(err, unix.IoctlSetPointerInt(int(ours.Fd()), unix.TIOCSPTLCK, 0)); err != nil {
		t.Fatal(err)
	}
	its, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skip("needs pseudo terminals: ", err)
	}
	t.Cleanup(func() { its.Close() })
	return ours, its
}

// A person is asked, and what is no yes changes nothing.
func TestWriteAsks(t *testing.T) {
	ctl := build(t)
	for answer, code := range map[string]int{"\n": exitFailure, "no\n": exitFailure, "y\n": exitOK, "YES\n": exitOK} {
		t.Run(strings.TrimSpace(answer), func(t *testing.T) {
			dir := t.TempDir()
			config := filepath.Join(dir, "config.toml")
			if err := os.WriteFile(config, []byte("version = 3\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			ours, its := openTerminal(t)
			if _, err := io.WriteString(ours, answer); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(ctl, "--address", filepath.Join(dir, "none"), "config", "containerd", "--containerd-version",
				"2.1", "--containerd-config", config, "--write")
			cmd.Stdin = its
			out, _ := cmd.CombinedOutput()
			for _, want := range []string{"create " + filepath.Join(dir, "conf.d/dedup-snapshotter.toml"), "change " + config,
				"Go on? [y/N]"} {
				if !strings.Contains(string(out), want) {
					t.Errorf("%q is not in %s", want, out)
				}
			}
			b, err := os.ReadFile(config)
			if changed := string(b) != "version = 3\n"; err != nil || cmd.ProcessState.ExitCode() != code ||
				changed != (code == exitOK) {
				t.Errorf("exit code %d, %v\n%s\n%s", cmd.ProcessState.ExitCode(), err, b, out)
			}
		})
	}
}

func TestWriteErrors(t *testing.T) {
	dir := t.TempDir()
	old, none := filepath.Join(dir, "old.toml"), filepath.Join(dir, "none")
	if err := os.WriteFile(old, []byte("[plugins.cri]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		args string
		code int
		want string
	}{
		{"--write --remove", exitUsage, "--write and --remove exclude each other"},
		{"--write --yes --containerd-version 1.7 --containerd-config " + old, exitFailure, "put version = 2 at its top"},
		{"--write --yes --containerd-version 2.1 --containerd-config " + dir, exitFailure, "is a directory"},
		{"--write --yes --containerd-address " + none, exitFailure, "containerd does not run"},
		{"--write --containerd-version 2.1 --containerd-config " + none, exitUsage, "add --yes"},
		{"--remove --containerd-config " + none, exitOK, ""},
	} {
		args := append(strings.Fields("--address "+none+" config containerd"), strings.Fields(row.args)...)
		if code, _, errs := dedupctl(t, args...); code != row.code || !strings.Contains(errs, row.want) {
			t.Errorf("%s: exit code %d, %s", row.args, code, errs)
		}
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(left) != 1 {
		t.Error(left, err)
	}
}

// A file that counts over the drop-in is named.
func TestWriteIsOverridden(t *testing.T) {
	dir := t.TempDir()
	config := filepath.Join(dir, "config.toml")
	late := "version = 3\n[plugins.\"io.containerd.service.v1.diff-service\"]\n  default = [\"walking\"]\n"
	for path, text := range map[string]string{config: "version = 3\nimports = [\"conf.d/*.toml\"]\n",
		filepath.Join(dir, "conf.d/zz.toml"): late} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	code, _, errs := dedupctl(t, "--address", filepath.Join(dir, "none"), "config", "containerd", "--write", "--yes",
		"--containerd-version", "2.1", "--containerd-config", config)
	if code != exitFailure || !strings.Contains(errs, "conf.d/zz.toml") || !strings.Contains(errs, "does not count") {
		t.Error(code, errs)
	}
}

// A relative path is that of a file here, not of one beside the config.
func TestWriteToRelativePath(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	text := "disabled_plugins = [\"cri\"]\n" // as Docker's package has it
	if err := os.WriteFile("config.toml", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"--address", filepath.Join(dir, "none"), "config", "containerd", "--yes", "--containerd-version",
		"2.1", "--containerd-config", "config.toml"}
	if code, out, errs := dedupctl(t, append(args, "--write")...); code != exitOK {
		t.Fatal(code, out, errs)
	}
	b, err := os.ReadFile("config.toml")
	want := fmt.Sprintf("imports = [%q] # added by dedupctl config containerd\n",
		filepath.Join(dir, "conf.d/dedup-snapshotter.toml")) + text
	if err != nil || string(b) != want {
		t.Errorf("%v\n%s\nwant\n%s", err, b, want)
	}
	if code, out, errs := dedupctl(t, append(args, "--remove")...); code != exitOK {
		t.Fatal(code, out, errs)
	}
	if b, err := os.ReadFile("config.toml"); err != nil || string(b) != text {
		t.Errorf("%v\n%s", err, b)
	}
}
