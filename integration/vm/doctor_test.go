package vm

import (
	"encoding/json"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// doctorRows are doctor's checks of the kernel, and what the table calls them.
var doctorRows = []struct{ check, row string }{
	{"kernel.dense-packs", "doctor: packs with blocks of 512 bytes"},
	{"kernel.data-only", "doctor: data-only lower layers"},
	{"kernel.nested", "doctor: overlays over a container's files"},
	{"kernel.user-namespaces", "doctor: the same in a user namespace"},
	{"kernel.id-mapped", "doctor: ID-mapped chain images"},
	{"kernel.fs-verity", "doctor: fs-verity"},
	{"kernel.hole-punching", "doctor: hole punching"},
}

// What `dedupctl doctor` finds on each kernel, also on those with pages of 16 and 64 KiB. It needs no node, and takes a
// minute for each.
func TestKernelDoctor(t *testing.T) {
	t.Parallel()
	for _, row := range []struct{ suite, mode, dense string }{
		{Bullseye, "refused", ""}, {Bookworm, "private, loop", "yes"}, {BookwormCoarse, "private, loop", "no"},
		{Trixie, "shared, file", "yes"}, {Sid, "shared, file", "yes"}, {TrixieArm, "shared, file", "yes"},
		{TrixieArm16K, "shared, file", "yes"}, {SidPower, "shared, file", "yes"},
	} {
		t.Run(strings.ReplaceAll(row.suite, "/", "-"), func(t *testing.T) {
			t.Parallel()
			k := kernelFor(t, row.suite)
			program := filepath.Join(t.TempDir(), "dedupctl")
			build(t, k.Arch, program, "build", "./cmd/dedupctl")
			out := runVM(t, Options{Kernel: k, Dir: t.TempDir(), Files: map[string]string{"repo/bin/dedupctl": program},
				Script: "echo \"row: kernel=$(uname -r)\"\n/repo/bin/dedupctl doctor --json > /said || true\n" +
					"sleep 1; echo; echo 'doctor: {'; tail -n +2 /said; echo 'doctor: end'\n"}, 30*time.Minute)
			_, text, _ := strings.Cut(out, "doctor: {\n")
			text, _, _ = strings.Cut(text, "doctor: end\n")
			var said struct {
				Findings []struct{ Check, Severity, Message string }
			}
			if err := json.Unmarshal([]byte("{"+text), &said); err != nil {
				t.Fatalf("%v: %s", err, text)
			}
			tellRows(t, row.suite, out)
			mode, dense := "", ""
			for _, f := range said.Findings {
				if f.Check == "kernel.mode" {
					mode = "refused"
					if m := regexp.MustCompile(`mode: ([a-z]+, [a-z]+)`).FindStringSubmatch(f.Message); m != nil {
						mode = m[1]
					}
				}
				if f.Check == "kernel.dense-packs" {
					dense = found(f.Severity, f.Message)
				}
				if strings.HasPrefix(f.Check, "kernel.") {
					t.Logf("%s: %s: %s", f.Check, f.Severity, f.Message)
				}
				for _, d := range doctorRows {
					if d.check == f.Check {
						tell(t, row.suite, d.row, found(f.Severity, f.Message))
					}
				}
			}
			if tell(t, row.suite, "doctor: mode", mode); mode != row.mode {
				t.Errorf("mode %q, want %q", mode, row.mode)
			}
			if dense != row.dense {
				t.Errorf("dense packs: %q, want %q", dense, row.dense)
			}
		})
	}
}

// found is a finding in a word.
func found(severity, message string) string {
	switch {
	case severity == "ok":
		return "yes"
	case strings.HasSuffix(message, "with metacopy=on"):
		return "with metacopy"
	}
	return "no"
}
