package ctdconfig

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const snippet = `version = 3
[proxy_plugins.dedup]
  type = "snapshot"
[plugins."io.containerd.service.v1.diff-service"]
  default = ["dedup-diff", "walking"]
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "overlayfs"
  differ = "walking"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "dedup"
  differ = "dedup-diff"
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "dedup"
`

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o640); err != nil {
		t.Fatal(err)
	}
}

// files returns what lies in a directory.
func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		name, _ := filepath.Rel(dir, path)
		out[name] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Whatever the main file looks like: the drop-in is imported, a second time changes nothing, and
// removing it leaves everything as it was before.
func TestInstallAndRemove(t *testing.T) {
	for name, text := range map[string]string{
		"a version and tables": "# mine\nversion = 3 # really\nroot = \"/x\"\n\n[grpc]\n  address = \"/y\"\n",
		"no version":           "root = \"/x\"\n[grpc]\naddress = \"/y\"\n",
		"tables alone":         "[grpc]\naddress = \"/y\"\n",
		"empty":                "",
		"no newline":           "version = 3",
		"imports":              "version = 3\nimports = [\"/etc/other.toml\"] # others\n[grpc]\n",
		"a trailing comma": "version = 3\nimports = [\n  \"/etc/a.toml\", # a, ]\n  '/etc/b#].toml' , # \"c\"\n  # " +
			"none\n]\n",
		"escapes":                "version = 3\nimports = [\"/etc/\\\"]a.toml\"]\n",
		"empty imports":          "imports = []\nversion = 3\n",
		"imports on many lines":  "version = 3\nimports = [\n  \"/etc/a.toml\", # a\n  \"/etc/b*.toml\",\n]\n[grpc]\n",
		"imports in a table":     "version = 3\n[plugins.\"x\"]\nimports = [\"no\"]\n",
		"a list like a table":    "version = 3\nrequired_plugins = [\n  \"a.b\",\n]\nimports = ['/etc/a.toml']\n",
		"relative pattern":       "version = 3\nimports = [\"conf.d/*.toml\"]\n",
		"windows line endings":   "version = 3\r\nroot = \"/x\"\r\n[grpc]\r\n",
		"the word in a string":   "version = 3\nroot = \"imports = [\"\n",
		"version after the list": "imports = [\"/etc/a.toml\"]\nversion = 3\n",
		"no file":                "-",
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			config := filepath.Join(dir, "config.toml")
			if text != "-" {
				write(t, config, text)
			}
			before := files(t, dir)
			for range 2 { // --remove leaves nothing in the way of another --write
				installs(t, config)
				plan, err := Remove(config)
				if err == nil {
					err = Execute(plan)
				}
				if err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff(before, files(t, dir)); d != "" {
					t.Errorf("(-before +after):\n%s", d)
				}
			}
			if plan, err := Remove(config); len(plan) > 0 || err != nil {
				t.Errorf("a second removal: %v, %v", plan, err)
			}
		})
	}
}

func installs(t *testing.T, config string) {
	t.Helper()
	plan, err := Install(config, []byte(snippet), 3)
	if err != nil {
		t.Fatal(err)
	}
	if err := Execute(plan); err != nil {
		t.Fatal(err)
	}
	if again, err := Install(config, []byte(snippet), 3); err != nil || len(again) > 0 {
		t.Errorf("a second time changes %v, %v", again, err)
	}
	b, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	values, err := decode(config, b)
	path, perr := DropInPath(config)
	if perr != nil {
		t.Fatal(perr)
	}
	if err != nil || !covers(config, values, path) {
		t.Errorf("%v: the drop-in is not imported by\n%s", err, b)
	}
	if err := Execute(plan); err == nil || !strings.Contains(err.Error(), "has changed meanwhile") {
		t.Errorf("an old plan: %v", err)
	}
}

func TestDiscards(t *testing.T) {
	for text, want := range map[string]bool{
		"version = 3\n": false,
		"version = 3\n[plugins.'io.containerd.cri.v1.images']\ndiscard_unpacked_layers = true\n":             true,
		"version = 3\n[plugins.'io.containerd.cri.v1.images']\ndiscard_unpacked_layers = false\n":            false,
		"version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\ndiscard_unpacked_layers = true\n":    true,
		"version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\ndiscard_unpacked_layers = 'maybe'\n": false,
	} {
		config := filepath.Join(t.TempDir(), "config.toml")
		write(t, config, text)
		c, err := Read(config, false)
		if err != nil || c.Discards() != want {
			t.Errorf("%s: %v, want %v", text, err, want)
		}
	}
}

// The backup and the drop-in of a file that only some may read are theirs alone, and a symlink stays one.
func TestModesAndLinks(t *testing.T) {
	dir := t.TempDir()
	real, config := filepath.Join(dir, "real.toml"), filepath.Join(dir, "config.toml")
	write(t, real, "version = 3\n")
	if err := os.Chmod(real, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("real.toml", config); err != nil {
		t.Fatal(err)
	}
	installs(t, config)
	dropIn, err := DropInPath(config)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{real, config + backupSuffix, dropIn} {
		if fi, err := os.Lstat(path); err != nil || fi.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", path, fi, err)
		}
	}
	if fi, err := os.Lstat(config); err != nil || fi.Mode().Type() != fs.ModeSymlink {
		t.Errorf("the symlink: %v, %v", fi, err)
	}
}

// A backup is kept when the file was edited after it was taken, since it is all that is left of the first state.
func TestRemoveKeepsLaterEdits(t *testing.T) {
	config := filepath.Join(t.TempDir(), "config.toml")
	write(t, config, "version = 3\n")
	installs(t, config)
	b, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	write(t, config, string(b)+"[grpc]\n")
	plan, err := Remove(config)
	if err == nil {
		err = Execute(plan)
	}
	want := map[string]string{"config.toml": "version = 3\n[grpc]\n", "config.toml" + backupSuffix: "version = 3\n"}
	if d := cmp.Diff(want, files(t, filepath.Dir(config))); err != nil || d != "" {
		t.Error(err, d)
	}
}

// What other files say in the sections of the drop-in is kept.
func TestDropInJoins(t *testing.T) {
	config := filepath.Join(t.TempDir(), "config.toml")
	write(t, config, `version = 2
imports = ["more.toml"]
[plugins."io.containerd.service.v1.diff-service"]
  default = ["mine", "walking"]
[plugins."io.containerd.transfer.v1.local"]
  max_concurrent_downloads = 7
  [[plugins."io.containerd.transfer.v1.local".unpack_config]]
    platform = "linux"
    snapshotter = "overlayfs"
    differ = "mine"
  [[plugins."io.containerd.transfer.v1.local".unpack_config]]
    platform = "linux"
    snapshotter = "dedup"
    differ = "walking"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "one"
`)
	write(t, filepath.Join(filepath.Dir(config), "more.toml"), `[plugins."io.containerd.grpc.v1.cri".containerd]
  default_runtime_name = "kata"
  snapshotter = "native"
`)
	for _, whole := range []bool{true, false} {
		c, err := Read(config, whole)
		if err != nil {
			t.Fatal(err)
		}
		text, err := c.DropIn(snippet, whole)
		if err != nil {
			t.Fatal(err)
		}
		got, err := decode("", text)
		if err != nil {
			t.Fatal(err)
		}
		plugins := table(got, "plugins")
		if d := cmp.Diff([]any{"dedup-diff", "mine", "walking"}, table(plugins, DiffService)["default"]); d != "" {
			t.Error(d)
		}
		entry := func(sn, differ string) map[string]any {
			return map[string]any{"platform": "linux", "snapshotter": sn, "differ": differ}
		}
		if d := cmp.Diff([]map[string]any{entry("overlayfs", "mine"), entry("dedup", "dedup-diff")},
			Tables(table(plugins, Transfer)["unpack_config"])); d != "" {
			t.Error(d)
		}
		// 1.7 has taken more.toml's section for the whole of it; 2.x reads the others beside ours.
		cri := table(table(plugins, "io.containerd.grpc.v1.cri"), "containerd")
		want := map[string]any{"snapshotter": "dedup"}
		if whole {
			want["default_runtime_name"] = "kata"
		}
		if d := cmp.Diff(want, cri); d != "" {
			t.Errorf("whole sections %v: %s", whole, d)
		}
		if downloads := table(plugins, Transfer)["max_concurrent_downloads"]; (downloads == int64(7)) != whole {
			t.Errorf("whole sections %v: max_concurrent_downloads = %v", whole, downloads)
		}
	}
	if c, err := Read(filepath.Join(t.TempDir(), "none"), false); err != nil || len(c.Files) > 0 {
		t.Error(c, err)
	} else if text, err := c.DropIn(snippet, false); err != nil || !bytes.Equal(text, []byte(snippet)) {
		t.Errorf("with nothing to keep: %v\n%s", err, text)
	}
}

func TestReadErrorsNameTheLine(t *testing.T) {
	config := filepath.Join(t.TempDir(), "config.toml")
	write(t, config, "version = 3\nimports = [\"/nowhere.toml\"]\n")
	if _, err := Read(config, false); err == nil || !strings.Contains(err.Error(), "/nowhere.toml") {
		t.Error(err)
	}
	write(t, config, "version = 3\nroot = \n")
	for _, f := range []func() error{
		func() error { _, err := Read(config, false); return err },
		func() error { _, err := Install(config, nil, 3); return err },
	} {
		if err := f(); err == nil || !strings.Contains(err.Error(), config+": line 2") {
			t.Error(err)
		}
	}
}

func TestConfigArgument(t *testing.T) {
	for line, want := range map[string]string{
		"containerd":                              "/etc/containerd/config.toml",
		"containerd -l info --config /a":          "/a",
		"/usr/bin/containerd -c rel.toml -a /x":   "rel.toml",
		"containerd --config=/a/b=c":              "/a/b=c",
		"containerd -c=/a":                        "/a",
		"containerd --address /x --config":        "/etc/containerd/config.toml",
		"/opt/config --state /y":                  "/etc/containerd/config.toml",
		"containerd --address=/config -log-level": "/etc/containerd/config.toml",
	} {
		if d := cmp.Diff(want, configArgument(strings.Fields(line), DefaultPath)); d != "" {
			t.Errorf("%s: %s", line, d)
		}
	}
}

// A directory all of which is imported takes the drop-in, and the main file stays as it is: some distributions of
// Kubernetes write it anew at every start.
func TestImportedDirectory(t *testing.T) {
	dir := t.TempDir()
	config, drop := filepath.Join(dir, "rancher/config.toml"), filepath.Join(dir, "drop")
	write(t, config, "version = 3\nimports = [\"/etc/one.toml\", \""+drop+"/*.toml\"]\n")
	write(t, filepath.Join(drop, "theirs.toml"), "version = 3\n")
	before := files(t, dir)
	installs(t, config)
	want := files(t, dir)
	delete(want, "drop/"+dropInName)
	if d := cmp.Diff(before, want); d != "" || len(files(t, dir)) != 3 {
		t.Errorf("%v: %s", files(t, dir), d)
	}
	plan, err := Remove(config)
	if err == nil {
		err = Execute(plan)
	}
	if d := cmp.Diff(before, files(t, dir)); err != nil || d != "" {
		t.Error(err, d)
	}
	write(t, config, "version = 3\n")
	if _, err := Install(config, nil, 3); err == nil || !strings.Contains(err.Error(), ".toml.tmpl") {
		t.Error(err)
	}
	config = filepath.Join(dir, "docker/containerd/containerd.toml")
	write(t, config, "version = 2\n")
	if _, err := Install(config, nil, 3); err == nil || !strings.Contains(err.Error(), "dockerd writes") {
		t.Error(err)
	}
}
