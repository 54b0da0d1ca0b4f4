package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pelletier/go-toml/v2"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// dedupctl config containerd --write makes a containerd that knows nothing of dedup pull with it, and --remove makes
// its configuration what it was.
func TestConfigWrite(t *testing.T) {
	t.Parallel()
	versions, err := node.Versions()
	must(t, err)
	for _, version := range versions {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			n, r := startNode(t, node.Options{Version: version, NoDedup: true}), startRegistry(t)
			ctx := testContext(t)
			must(t, n.StartDaemon(ctx))
			config := filepath.Join(n.Dir(), "containerd.toml")
			before, err := os.ReadFile(config)
			must(t, err)
			ref := push(t, r, "app:1", layer(t, image.File("app", string(make([]byte, 5000)))))
			args := []string{"config", "containerd", "--containerd-address", n.Address()}
			if out, err := dedupctl(t, n, append(args, "--write")...); err == nil ||
				!strings.Contains(out, "add --yes where nobody can answer") {
				t.Errorf("without --yes and a terminal: %v, %s", err, out)
			}
			for _, want := range []string{"restart containerd", "nothing to do"} {
				out, err := dedupctl(t, n, append(args, "--write", "--yes")...)
				if err != nil || !strings.Contains(out, want) {
					t.Fatalf("--write: %v, want %q: %s", err, want, out)
				}
			}
			must(t, n.RestartContainerd(ctx))
			pull(t, n, node.Snapshotter, ref)
			if trees, err := filepath.Glob(filepath.Join(n.DedupRoot(), "layers/*")); err != nil || len(trees) != 1 {
				t.Errorf("the daemon has %d layers, %v", len(trees), err)
			}
			pull(t, n, "overlayfs", ref) // still works
			if log, err := os.ReadFile(n.LogPath("dedup")); err != nil ||
				strings.Contains(string(log), "unpacked by another differ") {
				t.Errorf("the differ was not asked first: %v\n%s", err, log)
			}
			_, err = n.Ctr(ctx, "image", "rm", "--sync", ref)
			must(t, err)
			out, err := dedupctl(t, n, append(args, "--remove", "--yes")...)
			must(t, err)
			after, err := os.ReadFile(config)
			must(t, err)
			if d := cmp.Diff(string(before), string(after)); d != "" {
				t.Errorf("%s\n%s", out, d)
			}
			left, err := filepath.Glob(filepath.Join(n.Dir(), "conf.d*"))
			if backups, _ := filepath.Glob(config + ".*"); err != nil || len(left)+len(backups) > 0 {
				t.Errorf("%v and %v are left, %v", left, backups, err)
			}
			must(t, n.RestartContainerd(ctx))
			if err := n.Pull(ctx, node.Snapshotter, ref); err == nil {
				t.Error("containerd still knows dedup")
			}
		})
	}
}

// What containerd itself makes of its files with the drop-in: everything that was said before still counts.
func TestConfigWriteKeepsTheRest(t *testing.T) {
	t.Parallel()
	versions, err := node.Versions()
	must(t, err)
	for _, version := range versions {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			tools, err := node.Build(testContext(t), version, func(s string) { t.Log(s) })
			must(t, err)
			config := filepath.Join(t.TempDir(), "config.toml")
			text := `version = 3
[plugins."io.containerd.service.v1.diff-service"]
  default = ["walking", "mine"]
[plugins."io.containerd.transfer.v1.local"]
  max_concurrent_downloads = 7
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "native"
  differ = "walking"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "native"
  max_concurrent_downloads = 9
[plugins."io.containerd.cri.v1.images".registry]
  config_path = "/etc/registries"
`
			cri := "io.containerd.cri.v1.images"
			if strings.HasPrefix(version, "1.") {
				cri = "io.containerd.grpc.v1.cri"
				text = strings.NewReplacer("version = 3", "version = 2",
					"io.containerd.cri.v1.images\"]\n  snapshotter = \"native\"",
					cri+"\".containerd]\n  snapshotter = \"native\"\n[plugins.\""+cri+"\"]", "io.containerd.cri.v1.images",
					cri).Replace(text)
			}
			must(t, os.WriteFile(config, []byte(text), 0o600))
			root, err := node.ModuleRoot()
			must(t, err)
			out, err := exec.Command(filepath.Join(root, "bin/dedupctl"), "--address", filepath.Join(t.TempDir(), "s"), "config",
				"containerd", "--cri",
				"--containerd-version", version, "--containerd-config", config, "--write", "--yes").CombinedOutput()
			if err != nil || !strings.Contains(string(out), "does not run yet") {
				t.Fatal(err, string(out))
			}
			dump, err := exec.Command(filepath.Join(tools.Dir, "containerd"), "--config", config, "config", "dump").Output()
			must(t, err)
			var got struct {
				Proxy   map[string]map[string]any `toml:"proxy_plugins"`
				Plugins map[string]map[string]any
			}
			must(t, toml.Unmarshal(dump, &got))
			transfer, images := got.Plugins["io.containerd.transfer.v1.local"], got.Plugins[cri]
			var unpacks []string
			for _, e := range transfer["unpack_config"].([]any) {
				entry := e.(map[string]any)
				unpacks = append(unpacks, entry["snapshotter"].(string)+" "+entry["differ"].(string))
			}
			snapshotter := images["snapshotter"]
			if inner, ok := images["containerd"].(map[string]any); ok {
				snapshotter = inner["snapshotter"]
			}
			diff := cmp.Diff([]any{
				[]any{"dedup-diff", "walking", "mine"}, []string{"native walking", "overlayfs walking", "dedup dedup-diff"},
				int64(7),
				int64(9), "dedup", "/etc/registries", "snapshot",
			}, []any{
				got.Plugins["io.containerd.service.v1.diff-service"]["default"], unpacks, transfer["max_concurrent_downloads"],
				images["max_concurrent_downloads"], snapshotter, images["registry"].(map[string]any)["config_path"],
				got.Proxy["dedup"]["type"],
			})
			if diff != "" {
				t.Errorf("(-want +got):\n%s\n%s", diff, dump)
			}
		})
	}
}
