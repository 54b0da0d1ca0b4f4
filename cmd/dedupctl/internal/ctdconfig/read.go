// Package ctdconfig reads containerd's configuration files as containerd does, and puts a drop-in beside them.
//
// The main file names others in imports; each later file counts over the earlier ones. How, differs: containerd 1.7
// replaces a plugin's section as a whole, 2.x goes into tables and replaces values, lists as a whole. Defaults
// that are in no file are not seen here.
package ctdconfig

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// DefaultPath is where containerd looks when it is told nothing else.
const DefaultPath = "/etc/containerd/config.toml"

// Config is a main file and what it imports.
type Config struct {
	Path  string   // of the main file
	Files []string // that were read, the main file first; empty when there is none
	// Version of the main file's format, 0 when it says none.
	Version int
	values  map[string]any
}

// Read reads the configuration below path. whole tells that this containerd replaces whole sections (1.7). A
// file named in without counts as not there. A missing main file is an empty configuration.
func Read(path string, whole bool, without ...string) (*Config, error) {
	c := &Config{Path: path, values: map[string]any{}}
	for pending := []string{path}; len(pending) > 0; {
		file := pending[0]
		pending = pending[1:]
		if slices.Contains(c.Files, file) || slices.Contains(without, file) {
			continue
		}
		values, err := readFile(file)
		if errors.Is(err, fs.ErrNotExist) && file == path {
			return c, nil
		}
		if err != nil {
			return nil, err
		}
		if file == path {
			version, _ := values["version"].(int64)
			c.Version = int(version)
		}
		c.Files = append(c.Files, file)
		merge(c.values, values, whole)
		imported, err := imports(file, values)
		if err != nil {
			return nil, err
		}
		pending = append(pending, imported...)
	}
	return c, nil
}

func readFile(path string) (map[string]any, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read containerd's config: %w", err)
	}
	return decode(path, b)
}

func decode(path string, text []byte) (map[string]any, error) {
	values := map[string]any{}
	err := toml.Unmarshal(text, &values)
	if wrong := (*toml.DecodeError)(nil); errors.As(err, &wrong) {
		row, col := wrong.Position()
		return nil, fmt.Errorf("containerd's config %s: line %d, column %d: %w", path, row, col, err)
	}
	if err != nil {
		return nil, fmt.Errorf("containerd's config %s: %w", path, err)
	}
	return values, nil
}

// imports returns the files that a file names, with patterns resolved.
func imports(file string, values map[string]any) ([]string, error) {
	var out []string
	for _, pattern := range Strings(values["imports"]) {
		path := absolute(file, pattern)
		if !strings.Contains(path, "*") {
			out = append(out, path)
			continue
		}
		matches, err := filepath.Glob(path)
		if err != nil {
			return nil, fmt.Errorf("containerd's config %s: imports %q: %w", file, pattern, err)
		}
		out = append(out, matches...)
	}
	return out, nil
}

// absolute resolves what a file imports.
func absolute(file, path string) string {
	if path = filepath.Clean(path); filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(filepath.Dir(file), path)
}

// merge puts the tables that matter here over those of earlier files.
func merge(to, from map[string]any, whole bool) {
	for _, table := range []string{"plugins", "proxy_plugins"} {
		more, _ := from[table].(map[string]any)
		have, _ := to[table].(map[string]any)
		if have == nil {
			have = map[string]any{}
			to[table] = have
		}
		if whole || table == "proxy_plugins" {
			maps.Copy(have, more)
		} else {
			overlay(have, more)
		}
	}
	to["disabled_plugins"] = append(Strings(to["disabled_plugins"]), Strings(from["disabled_plugins"])...)
}

// overlay puts values over others, table by table.
func overlay(to, from map[string]any) {
	for key, value := range from {
		more, isTable := value.(map[string]any)
		have, wasTable := to[key].(map[string]any)
		if isTable && wasTable {
			have = maps.Clone(have)
			overlay(have, more)
			to[key] = have
			continue
		}
		to[key] = value
	}
}

// Plugin returns the section of a plugin, nil when it has none. It must not be changed.
func (c *Config) Plugin(id string) map[string]any {
	return table(table(c.values, "plugins"), id)
}

// Proxy returns the section of a proxy plugin, nil when it has none. It must not be changed.
func (c *Config) Proxy(name string) map[string]any {
	return table(table(c.values, "proxy_plugins"), name)
}

// Discards tells whether CRI gives up an image's layers once one snapshotter has unpacked them
// (discard_unpacked_layers). What another snapshotter needs later is then gone.
func (c *Config) Discards() bool {
	discards, ok := c.Plugin(CRIImages)["discard_unpacked_layers"]
	if !ok { // as containerd 1.7 has it, which newer ones read too
		discards = table(c.Plugin("io.containerd.grpc.v1.cri"), "containerd")["discard_unpacked_layers"]
	}
	return discards == true
}

// Disabled are the ids of plugins that are switched off.
func (c *Config) Disabled() []string { return Strings(c.values["disabled_plugins"]) }

func table(of map[string]any, key string) map[string]any {
	t, _ := of[key].(map[string]any)
	return t
}

// Strings returns the strings in a list.
func Strings(list any) []string {
	switch list := list.(type) {
	case []string:
		return list
	case []any:
		var out []string
		for _, v := range list {
			if s, ok := v.(string); ok {
				out = append(out, s)
			}
		}
		return out
	}
	return nil
}

// Tables returns the tables in a list.
func Tables(list any) []map[string]any {
	values, _ := list.([]any)
	var out []map[string]any
	for _, v := range values {
		if t, ok := v.(map[string]any); ok {
			out = append(out, t)
		}
	}
	return out
}
