package ctdconfig

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"github.com/pelletier/go-toml/v2"
)

const (
	dropInName   = "dedup-snapshotter.toml"
	backupSuffix = ".before-dedup"
	mark         = "# added by dedupctl config containerd"
)

// Plugin ids whose sections hold lists that a drop-in replaces.
const (
	DiffService = "io.containerd.service.v1.diff-service"
	CRIImages   = "io.containerd.cri.v1.images"
	Transfer    = "io.containerd.transfer.v1.local"
)

// DropInPath is where the drop-in of a main file lies, or would: in a directory all of which the file imports, else in
// conf.d beside it.
func DropInPath(config string) (string, error) {
	text, err := readOrNil(config)
	if err != nil {
		return "", err
	}
	values, err := decode(config, text)
	if err != nil {
		return "", err
	}
	for _, pattern := range Strings(values["imports"]) {
		dir, names := filepath.Split(absolute(config, pattern))
		if ok, err := filepath.Match(names, dropInName); ok && err == nil && names != dropInName &&
			!strings.Contains(dir, "*") {
			return filepath.Join(dir, dropInName), nil
		}
	}
	return filepath.Join(filepath.Dir(config), "conf.d", dropInName), nil
}

// DropIn returns what the drop-in has to hold so that everything in snippet counts, and nothing
// that the other files say is lost: lists are joined, and with containerd 1.7, which replaces whole sections,
// the sections are copied.
func (c *Config) DropIn(snippet string, whole bool) ([]byte, error) {
	ours, err := decode("drop-in", []byte(snippet))
	if err != nil {
		return nil, err
	}
	changed := false
	sections := table(ours, "plugins")
	for id, section := range sections {
		have := c.Plugin(id)
		if have == nil {
			continue
		}
		merged := maps.Clone(section.(map[string]any))
		joinLists(merged, have)
		if whole {
			all := maps.Clone(have)
			overlay(all, merged)
			merged = all
		}
		changed = changed || !reflect.DeepEqual(merged, section)
		sections[id] = merged
	}
	if !changed {
		return []byte(snippet), nil
	}
	var out bytes.Buffer
	fmt.Fprintf(&out, "# Written by dedupctl config containerd --write; --remove takes it away again.\n"+
		"# It repeats what %s says in the sections below, which it replaces.\n", strings.Join(c.Files, ", "))
	e := toml.NewEncoder(&out)
	e.SetIndentTables(true)
	if err := e.Encode(ours); err != nil {
		return nil, fmt.Errorf("encode drop-in: %w", err)
	}
	return out.Bytes(), nil
}

// joinLists keeps in a section's lists what another file has in them: ours comes first where the order
// matters, and last where it is a choice.
func joinLists(section, have map[string]any) {
	if differs, ok := section["default"].([]any); ok && have["default"] != nil {
		others, _ := have["default"].([]any)
		list := slices.Clone(differs[:1])
		for _, d := range others {
			if !slices.Contains(list, d) {
				list = append(list, d)
			}
		}
		section["default"] = list
	}
	if have["unpack_config"] == nil {
		return
	}
	var list []any
	for _, entry := range Tables(have["unpack_config"]) {
		list = append(list, entry)
	}
	for _, entry := range Tables(section["unpack_config"]) {
		list = slices.DeleteFunc(list, func(v any) bool {
			return v.(map[string]any)["snapshotter"] == entry["snapshotter"] && entry["snapshotter"] != "overlayfs"
		})
		if !slices.ContainsFunc(list, func(v any) bool { return v.(map[string]any)["snapshotter"] == entry["snapshotter"] }) {
			list = append(list, entry)
		}
	}
	section["unpack_config"] = list
}

// Change is what becomes of one file. Before is nil for one that is not there, After for one that goes.
type Change struct {
	Path          string
	Before, After []byte
	like          string // a new file gets this one's mode and owner: a config may hold passwords
}

// Install plans the drop-in, and the import of it where the main file has none that covers it. version is the
// format of a main file that has to be made. No changes mean that all is in place.
func Install(config string, dropIn []byte, version int) ([]Change, error) {
	var plan []Change
	path, err := DropInPath(config)
	if err != nil {
		return nil, err
	}
	old, err := readOrNil(path)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(old, dropIn) {
		plan = append(plan, Change{Path: path, Before: old, After: dropIn, like: config})
	}
	text, err := readOrNil(config)
	if err != nil {
		return nil, err
	}
	if text == nil {
		made := fmt.Appendf(nil, "%s\nversion = %d\nimports = [%q]\n", mark, version, path)
		return append(plan, Change{Path: config, After: made}), nil
	}
	values, err := decode(config, text)
	if err != nil {
		return nil, err
	}
	if covers(config, values, path) {
		return plan, nil
	}
	switch {
	case strings.Contains(config, "/rancher/"):
		return nil, fmt.Errorf("k3s and RKE2 write %s anew at every start: put what `dedupctl config containerd` prints "+
			"into the template beside it "+
			"(config-v3.toml.tmpl, or config.toml.tmpl for containerd 1.7)", config)
	case strings.Contains(config, "/docker/containerd/"):
		return nil, fmt.Errorf("dockerd writes %s anew at every start: install containerd as a service of its own, which "+
			"dockerd then uses", config)
	}
	edited, err := addImport(config, text, values, path)
	if err != nil {
		return nil, err
	}
	backup := config + backupSuffix
	if saved, err := readOrNil(backup); err != nil {
		return nil, err
	} else if saved == nil {
		plan = append(plan, Change{Path: backup, After: text, like: config})
	}
	return append(plan, Change{Path: config, Before: text, After: edited}), nil
}

// covers tells whether a main file imports path.
func covers(config string, values map[string]any, path string) bool {
	for _, pattern := range Strings(values["imports"]) {
		pattern = absolute(config, pattern)
		if ok, err := filepath.Match(pattern, path); pattern == path || err == nil && ok {
			return true
		}
	}
	return false
}

var (
	firstTable  = regexp.MustCompile(`(?m)^[ \t]*\[`)
	importsList = regexp.MustCompile(`(?m)^[ \t]*imports[ \t]*=[ \t]*\[`)
	versionLine = regexp.MustCompile(`(?m)^[ \t]*version[ \t]*=.*$`)
)

// addImport adds a file to the imports, and leaves every other byte as it is.
func addImport(config string, text []byte, values map[string]any, path string) ([]byte, error) {
	list := importsList.FindIndex(text)
	// Keys of the file itself stand before its first table; a list over several lines may look like one.
	end := len(text)
	if at := firstTable.FindIndex(text); at != nil && (list == nil || at[0] < list[0]) {
		end = at[0]
	}
	line := fmt.Sprintf("imports = [%q] %s\n", path, mark)
	var edited []byte
	switch version := versionLine.FindIndex(text[:end]); {
	case list != nil && list[0] < end:
		at, entry := endOfList(text, list[1]), fmt.Sprintf("%q", path)
		if at > list[1] && text[at-1] != ',' {
			entry = ", " + entry
		}
		edited = slices.Concat(text[:at], []byte(entry), text[at:])
	case version != nil && version[1] < len(text):
		edited = slices.Concat(text[:version[1]+1], []byte(line), text[version[1]+1:])
	case version != nil:
		edited = slices.Concat(text[:version[0]], []byte(line), text[version[0]:])
	default:
		edited = slices.Concat([]byte(line), text)
	}
	// Whatever the file looks like: only what is meant may have changed.
	got, err := decode(config, edited)
	want := maps.Clone(values)
	want["imports"] = slices.Concat(Strings(values["imports"]), []string{path}) // the last file counts over the others
	if err == nil {
		got["imports"] = Strings(got["imports"])
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		return nil, fmt.Errorf("%s cannot be edited safely: add %q to its imports by hand, then run this again", config, path)
	}
	return edited, nil
}

// endOfList returns the place behind the last element, or the last comma, of a list that begins at start.
func endOfList(text []byte, start int) int {
	end := start
	for i := start; i < len(text); i++ {
		switch c := text[i]; c {
		case ']':
			return end
		case '#':
			for i < len(text) && text[i] != '\n' {
				i++
			}
		case '"', '\'':
			for i++; i < len(text) && text[i] != c; i++ {
				if c == '"' && text[i] == '\\' {
					i++
				}
			}
			end = i + 1
		case ' ', '\t', '\r', '\n':
		default:
			end = i + 1
		}
	}
	return min(end, len(text))
}

// Remove plans to take away what Install put there.
func Remove(config string) ([]Change, error) {
	var plan []Change
	path, err := DropInPath(config)
	if err != nil {
		return nil, err
	}
	text, err := readOrNil(config)
	if err != nil {
		return nil, err
	}
	if edited := withoutImport(text, path); !bytes.Equal(edited, text) {
		if _, err := decode(config, edited); err != nil {
			return nil, fmt.Errorf("take %q out of the imports of %s by hand: %w", path, config, err)
		}
		change := Change{Path: config, Before: text, After: edited}
		if bytes.HasPrefix(edited, []byte(mark+"\nversion = ")) && bytes.Count(edited, []byte("\n")) == 3 {
			change.After = nil // made by Install, and nobody has added anything
		}
		plan = append(plan, change)
		text = edited
	}
	for _, file := range []string{path, config + backupSuffix} {
		old, err := readOrNil(file)
		if err != nil {
			return nil, err
		}
		if old != nil && (file == path || bytes.Equal(old, text)) {
			plan = append(plan, Change{Path: file, Before: old})
		}
	}
	return plan, nil
}

// withoutImport undoes addImport.
func withoutImport(text []byte, path string) []byte {
	line := fmt.Appendf(nil, "imports = [%q] %s\n", path, mark)
	if bytes.Contains(text, line) {
		return bytes.Replace(text, line, nil, 1)
	}
	list := importsList.FindIndex(text)
	if list == nil {
		return text
	}
	end := endOfList(text, list[1])
	for _, entry := range []string{fmt.Sprintf(", %q", path), fmt.Sprintf("%q", path)} {
		if rest, ok := bytes.CutSuffix(text[:end], []byte(entry)); ok && len(rest) >= list[1] {
			return slices.Concat(rest, text[end:])
		}
	}
	return text
}

func readOrNil(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read containerd's config: %w", err)
	}
	if b == nil {
		b = []byte{}
	}
	return b, nil
}

// Execute carries out a plan in its order. Each file is replaced at once, and keeps its mode and owner.
func Execute(plan []Change) error {
	for _, c := range plan {
		if err := c.execute(); err != nil {
			return err
		}
	}
	return nil
}

func (c Change) execute() error {
	now, err := readOrNil(c.Path)
	if err != nil {
		return err
	}
	if !bytes.Equal(now, c.Before) || (now == nil) != (c.Before == nil) {
		return fmt.Errorf("%s has changed meanwhile: run this again", c.Path)
	}
	if c.After == nil {
		if err := os.Remove(c.Path); err != nil {
			return fmt.Errorf("remove drop-in: %w", err)
		}
		if filepath.Base(c.Path) == dropInName {
			_ = os.Remove(filepath.Dir(c.Path)) // only when it is empty
		}
		return nil
	}
	return c.replace()
}

// replace writes the file under another name first: containerd may start at any time.
func (c Change) replace() (err error) {
	path := c.Path
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("write containerd's config: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".dedup-")
	if err != nil {
		return fmt.Errorf("write containerd's config: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("write containerd's config: %w", err), os.Remove(f.Name()))
		}
	}()
	_, err = f.Write(c.After)
	if err := errors.Join(err, setMode(f, path, c.like), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// setMode gives a file the mode and owner of the first of others that is there.
func setMode(f *os.File, others ...string) error {
	for _, other := range others {
		fi, err := os.Stat(other)
		if err != nil {
			continue
		}
		if owner, ok := fi.Sys().(*syscall.Stat_t); ok {
			if err := f.Chown(int(owner.Uid), int(owner.Gid)); err != nil {
				return err
			}
		}
		return f.Chmod(fi.Mode().Perm())
	}
	return f.Chmod(0o644)
}
