package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/dedup-snapshotter/dedup-snapshotter/content/layer"
)

func TestConfig(t *testing.T) {
	for _, row := range []struct{ name, text, err string }{
		{"the three paths are enough", "root = '/r'\naddress = '/a/s.sock'\ncontainerd_address = '/c'\n", ""},
		{"unknown key", "root = '/r'\nfidelty = 'exact'\n", `line 2: unknown key "fidelty" (known: root,`},
		{"unknown table", "[gc]\nx = 1\n", `unknown key "gc`},
		{"bad fidelity", "fidelity = 'most'", `fidelity = "most": want "exact", "python" or "normalized"`},
		{"bad reuse", "reuse = 'all'", `reuse = "all": want`},
		{"bad blobs", "blobs = 'lose'", `blobs = "lose": want "keep" or "drop"`},
		{"bad level", "log_level = 'loud'", `log_level = "loud": want`},
		{"metrics without address", "metrics_address = ':9741'", "want an IP address"},
		{"metrics by name", "metrics_address = 'localhost:9741'", "want an IP address"},
		{"profiles for all", "pprof_address = '0.0.0.0:9742'", "want a loopback IP address"},
		{"profiles of no address", "pprof_address = ':9742'", "want a loopback IP address"},
		{"profiles by name", "pprof_address = 'localhost:9742'", "want a loopback IP address"},
		{"bad durability", "durability = 'never'", `durability = "never": want "strict" or "deferred"`},
		{"bad verity", "verity = 'yes'", `verity = "yes": want "auto", "on" or "off"`},
		{"reserve of all", "reserve_space = '95%'", `reserve_space = "95%": want a part`},
		{"reserve of nothing known", "reserve_inodes = 'many'", `reserve_inodes = "many": want a part`},
		{"negative time", "keep_mounted = '-1s'", `keep_mounted = "-1s": want`},
		{"negative reserve", "reserve_space = '-1GB'", `reserve_space = "-1GB": want`},
		{"long socket path", "address = '/run/" + strings.Repeat("x", 103) + "'",
			"has 108 bytes, and the path of a unix socket at most 107"},
		{"relative root", "root = 'r'", `root = "r": want an absolute path`},
		{"root with a colon", "root = '/a:b'", "must not hold a comma, colon"},
		{"wrong type", "root = 3", "line 1"},
		{"no TOML", "root", "line 1"},
	} {
		t.Run(row.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "config.toml")
			if err := os.WriteFile(path, []byte(row.text), 0o600); err != nil {
				t.Fatal(err)
			}
			c, err := loadConfig(path, true)
			if row.err == "" {
				if err != nil || c.Fidelity != "python" || c.Reuse != "known" || c.RunDir != "/a" {
					t.Errorf("%+v, %v", c, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), row.err) || !strings.Contains(err.Error(), path) {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestMissingConfig(t *testing.T) {
	path := filepath.Join(t.TempDir(), "none.toml")
	if _, err := loadConfig(path, true); err == nil {
		t.Error("a config that was asked for is missing, and nobody says so")
	}
	if c, err := loadConfig(path, false); err != nil || c.Root != defaultConfig().Root {
		t.Error(c, err)
	}
}

func TestReserve(t *testing.T) {
	for text, want := range map[string]layer.Amount{
		"1%": {Percent: 1}, "0": {}, "12.5 %": {Percent: 12.5}, "2GB": {Fixed: 2e9}, "100000": {Fixed: 100_000},
	} {
		got, err := amount(text)
		if err != nil || got != want {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
}
