package main

import (
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// How the shells are asked what they would offer for a line, whose words are $1 and up.
var asked = map[string]string{
	"bash": `source <(dedupctl completion bash); COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
		_dedupctl; printf '%s\n' "${COMPREPLY[@]}"`,
	"zsh": `compdef() { registered=$2; }; _files() { }
		compadd() { shift; for word in "$@"; [[ $word == $words[CURRENT]* ]] && print -r -- $word; return 0; }
		words=("$@"); CURRENT=$#; source <(dedupctl completion zsh); [[ $registered == dedupctl ]] && _dedupctl`,
	"fish": `dedupctl completion fish | source; complete -C (string join ' ' -- $argv) | string replace -r '\t.*' ''`,
}

// What each shell offers, with the real shell and the real binary.
func TestCompletion(t *testing.T) {
	ctl := build(t)
	for shell, script := range asked {
		t.Run(shell, func(t *testing.T) {
			path, err := exec.LookPath(shell)
			if err != nil {
				t.Skip("needs ", shell)
			}
			for _, row := range []struct {
				words []string
				want  []string
			}{
				{[]string{"dedupctl", "du"}, []string{"duplicates"}},
				{[]string{"dedupctl", "status"}, []string{"status"}},
				{[]string{"dedupctl", "--json", "co"}, []string{"complete", "completion", "config"}},
				{[]string{"dedupctl", "--js"}, []string{"--json"}},
				{[]string{"dedupctl", "config", "conta"}, []string{"containerd"}},
				{[]string{"dedupctl", "config", "containerd", "--wr"}, []string{"--write"}},
				{[]string{"dedupctl", "images", "--js"}, []string{"--json"}},
			} {
				args := append([]string{"-c", script}, row.words...)
				if shell != "fish" { // fish has no $0
					args = append([]string{"-c", script, shell}, row.words...)
				}
				cmd := exec.Command(path, args...)
				cmd.Env = []string{"PATH=" + filepath.Dir(ctl) + ":/usr/bin:/bin", "HOME=" + t.TempDir()}
				cmd.Dir = t.TempDir() // no files to complete
				out, err := cmd.CombinedOutput()
				if err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
				got := slices.Compact(slices.Sorted(slices.Values(strings.Fields(string(out)))))
				if d := cmp.Diff(row.want, got); d != "" {
					t.Errorf("%q (-want +got):\n%s", row.words, d)
				}
			}
		})
	}
}

func TestCompletionErrors(t *testing.T) {
	for _, args := range [][]string{{"completion"}, {"completion", "tcsh"}, {"completion", "bash", "zsh"}} {
		if code, out, errs := dedupctl(t, args...); code != exitUsage || out != "" ||
			!strings.Contains(errs, "bash, zsh or fish") {
			t.Errorf("%q: exit code %d, %s%s", args, code, out, errs)
		}
	}
}
