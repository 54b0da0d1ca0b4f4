package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pelletier/go-toml/v2"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedupctl/internal/doctor"
)

// dedupctl runs the program in this process.
func dedupctl(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs strings.Builder
	code = run(t.Context(), append([]string{"dedupctl"}, args...), &out, &errs)
	return code, out.String(), errs.String()
}

func TestConfigVersion(t *testing.T) {
	for _, row := range []struct {
		containerd string
		want       int
		staging    bool
	}{
		{"1.7", 2, false}, {"v1.7.24", 2, false}, {"1.7~ds1", 2, false}, {"1.10.0", 2, false}, {"2.0", 3, false},
		{"2.3.7", 3, false}, {"v2.4.2", 3, true}, {"2.0-beta.1", 3, false}, {"2.10.0", 3, true}, {"3.1", 3, true},
		{"1.6.8", 0, false}, {"0.9", 0, false}, {"", 0, false}, {"v", 0, false}, {"2", 0, false}, {"2.x", 0, false},
		{"latest", 0, false},
	} {
		got, staging, err := configVersion(row.containerd)
		if got != row.want || staging != row.staging || (err == nil) != (row.want > 0) {
			t.Errorf("%q: %d, %v, %v, want %d, %v", row.containerd, got, staging, err, row.want, row.staging)
		}
	}
}

type values = map[string]any

func TestContainerdConfig(t *testing.T) {
	for _, row := range []struct {
		name string
		args []string
		want values // beside what is always there
	}{
		{"1.7", []string{"--containerd-version", "1.7.35"}, values{"version": int64(2)}},
		{"2.x", []string{"--containerd-version", "2.3.7"}, values{"version": int64(3)}},
		{"2.4", []string{"--containerd-version", "2.4.2"}, values{"version": int64(3)}},
		{"1.7 for the kubelet", []string{"--cri", "--containerd-version", "1.7"}, values{"version": int64(2),
			"io.containerd.grpc.v1.cri": values{"containerd": values{"snapshotter": "dedup"}}}},
		{"DaemonSet", []string{"--daemonset", "--containerd-version", "2.3"}, values{"version": int64(3),
			"io.containerd.service.v1.diff-service": nil}},
		{"2.x for the kubelet", []string{"--cri", "--containerd-version", "2.1"}, values{"version": int64(3),
			"io.containerd.cri.v1.images": values{"snapshotter": "dedup"}}},
	} {
		t.Run(row.name, func(t *testing.T) {
			socket, root := filepath.Join(t.TempDir(), "s"), `/data/"quoted" \ root`
			code, out, errs := dedupctl(t, append([]string{"--address", socket, "config", "containerd", "--root", root},
				row.args...)...)
			if code != exitOK || errs != "" {
				t.Fatal(code, errs)
			}
			var got values
			if err := toml.Unmarshal([]byte(out), &got); err != nil {
				t.Fatal(err, out)
			}
			plugins := values{
				"io.containerd.service.v1.diff-service": values{"default": []any{"dedup-diff", "walking"}},
				"io.containerd.transfer.v1.local": values{"unpack_config": []any{
					values{"platform": "linux", "snapshotter": "overlayfs", "differ": "walking"},
					values{"platform": "linux", "snapshotter": "dedup", "differ": "dedup-diff"},
				}},
			}
			proxy := values{"type": "snapshot", "address": socket, "exports": values{"root": root}}
			var capabilities []any
			if row.name == "2.4" {
				capabilities = append(capabilities, "rebase")
			}
			if row.want["version"] != int64(2) && doctor.MapsIDs("/") == nil {
				capabilities = append(capabilities, "remap-ids")
			}
			if capabilities != nil {
				proxy["capabilities"] = capabilities
			}
			want := values{
				"version": row.want["version"],
				"plugins": plugins,
				"proxy_plugins": values{
					"dedup":      proxy,
					"dedup-diff": values{"type": "diff", "address": socket},
				},
			}
			for k, v := range row.want {
				switch {
				case v == nil:
					delete(plugins, k)
				case k != "version":
					plugins[k] = v
				}
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestContainerdConfigJSON(t *testing.T) {
	code, out, _ := dedupctl(t, "config", "containerd", "--containerd-version", "2.1.4", "--json")
	var got ContainerdConfig
	if err := json.Unmarshal([]byte(out), &got); err != nil || code != exitOK {
		t.Fatal(code, err, out)
	}
	if got.ContainerdVersion != "2.1.4" || got.ConfigVersion != 3 || !strings.Contains(got.TOML, "[proxy_plugins.dedup]") {
		t.Errorf("%+v", got)
	}
}

func TestCommandLineErrors(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	none := filepath.Join(dir, "none")
	for _, row := range []struct {
		args string
		code int
		want []string
	}{
		{"", exitUsage, []string{"what to do is missing: status, images, layers,", "config, completion (see --help)"}},
		{"stauts", exitUsage, []string{`unknown command "stauts": did you mean status?`}},
		{"status now", exitUsage, []string{`status: unexpected argument "now"`}},
		{"duplicates --limit 0", exitUsage, []string{"--limit 0: want 1 to 1000"}},
		{"status --jsn", exitUsage, []string{"-jsn", "see --help"}},
		{"--jsn status", exitUsage, []string{"-jsn", "see --help"}},
		{"config", exitUsage, []string{"what to do is missing: containerd"}},
		{"config docker", exitUsage, []string{`unknown command "docker": want containerd`}},
		{"config containerd --containerd-version 1.6.3", exitUsage, []string{"too old", "1.7 and newer"}},
		{"config containerd --containerd-version new", exitUsage, []string{`"new": want one like 1.7`}},
		{"config containerd --containerd-address " + none, exitFailure,
			[]string{"containerd does not run: no socket " + none, "systemctl start containerd", "--containerd-version 2.1"}},
		{"status --address " + none, exitFailure,
			[]string{"does not run: no socket " + none, "systemctl start containerd-dedup-grpc", "--address"}},
		{"--address " + none + " layers", exitFailure, []string{"no socket " + none}},
		{"images --address " + none, exitFailure, []string{"no socket " + none}},
		{"--json --address " + none + " duplicates", exitFailure, []string{"no socket " + none}},
		{"status --address " + plain, exitFailure,
			[]string{"nobody listens on " + plain, "journalctl -u containerd-dedup-grpc"}},
	} {
		t.Run(fmt.Sprintf("dedupctl %s", row.args), func(t *testing.T) {
			code, out, errs := dedupctl(t, strings.Fields(row.args)...)
			if code != row.code || out != "" {
				t.Errorf("exit code %d, want %d; on stdout: %s", code, row.code, out)
			}
			for _, want := range row.want {
				if !strings.Contains(errs, want) {
					t.Errorf("%q is not in: %s", want, errs)
				}
			}
		})
	}
}

func TestHelp(t *testing.T) {
	for _, args := range [][]string{{"--help"}, {"status", "--help"}, {"config", "--help"},
		{"config", "containerd", "-h"}} {
		if code, out, _ := dedupctl(t, args...); code != exitOK || !strings.Contains(out, "USAGE") {
			t.Errorf("%v: exit code %d, %s", args, code, out)
		}
	}
	if _, out, _ := dedupctl(t, "--help"); !strings.Contains(out, "Exit codes: 0 done, 1 it did not work, 2 the "+
		"command line is wrong, 3 ") {
		t.Error("the exit codes are not documented")
	}
}
