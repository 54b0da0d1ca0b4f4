package main

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	deployedConfig = "../../deploy/config.toml"
	configDoc      = "../../docs/configuration.md"
	unitFile       = "../../deploy/containerd-dedup-grpc.service"
)

func configKeys() (keys []string) {
	typ := reflect.TypeFor[Config]()
	for i := range typ.NumField() {
		keys = append(keys, typ.Field(i).Tag.Get("toml"))
	}
	return keys
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// The config that is installed changes nothing, and shows every key with its default.
func TestDeployedConfig(t *testing.T) {
	want := defaultConfig()
	want.RunDir = filepath.Dir(want.Address)
	text := readFile(t, deployedConfig)
	uncommented := regexp.MustCompile(`(?m)^#([a-z_]+ = )`).ReplaceAllString(text, "$1")
	path := filepath.Join(t.TempDir(), "config.toml")
	for _, text := range []string{text, uncommented} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := loadConfig(path, true)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
	}
	for _, key := range configKeys() {
		if !strings.Contains(text, "\n#"+key+" = ") {
			t.Errorf("%s has no %s", deployedConfig, key)
		}
	}
}

// The documentation has every key, and no key that there is not.
func TestConfigIsDocumented(t *testing.T) {
	text, _, _ := strings.Cut(readFile(t, configDoc), "\n## ")
	var documented []string
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\|").FindAllStringSubmatch(text, -1) {
		documented = append(documented, m[1])
	}
	if d := cmp.Diff(configKeys(), documented); d != "" {
		t.Errorf("keys in %s: %s", configDoc, d)
	}
}

// The unit must not get a mount namespace of its own, where chain images would be out of
// containerd's sight (systemd.exec(5): which settings imply one).
func TestUnitStaysInHostMounts(t *testing.T) {
	text := readFile(t, unitFile)
	for _, want := range []string{"Type=notify", "Restart=always", "KillMode=process", "RuntimeDirectoryPreserve=yes"} {
		if !strings.Contains(text, "\n"+want+"\n") {
			t.Errorf("%s is missing", want)
		}
	}
	implied := regexp.MustCompile(`(?m)^(Private(Tmp|Devices|Mounts|IPC|Users|Network)|Protect\w+|` +
		`RootDirectory|RootImage|ReadWritePaths|ReadOnlyPaths|InaccessiblePaths|ExecPaths|NoExecPaths|BindPaths|` +
		`BindReadOnlyPaths|TemporaryFileSystem|MountFlags|MountImages|DynamicUser|ExtensionImages|LoadCredential\w*)=(.*)$`)
	for _, m := range implied.FindAllStringSubmatch(text, -1) {
		if m[3] != "no" {
			t.Errorf("%s gives the unit a mount namespace of its own", m[0])
		}
	}
}
