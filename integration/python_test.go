package integration

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/content"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// checkBytecode lets CPython itself judge every compiled file below its search path: the checks are those that
// importlib makes before it runs one.
const checkBytecode = `
import importlib._bootstrap_external as be, importlib.util, json, os, sys
from importlib.machinery import SourceFileLoader
found = dict(valid=0, hashed=0, stale=[], missing=[])
for top in sys.path:
    for where, _, names in os.walk(top) if os.path.isdir(top) else ():
        for name in names:
            if not name.endswith(".py"): continue
            path = os.path.join(where, name)
            loader, cached = SourceFileLoader("m", path), importlib.util.cache_from_source(path)
            if not os.path.exists(cached):
                found["missing"].append(path)
                continue
            data = loader.get_data(cached)
            try:
                if be._classify_pyc(data, "m", {}) & 1: found["hashed"] += 1; continue
                st = loader.path_stats(path)
                be._validate_timestamp_pyc(data, int(st["mtime"]), st["size"], "m", {})
                found["valid"] += 1
            except ImportError as e: found["stale"].append(path + ": " + str(e))
print(json.dumps(found))`

// bytecode is what checkBytecode prints.
type bytecode struct {
	Valid, Hashed  int
	Stale, Missing []string
}

// pythonImage is an image with one CPython and some packages of real pip installs.
type pythonImage struct {
	name    string
	layers  []*image.Layer
	imports string
}

func pythonImages(t *testing.T) []pythonImage {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: debootstrap and chroot do")
	}
	base, apps := demoImages(t)
	ctx := testContext(t)
	newer, err := inputs.OpenNewer(func(text string) { t.Log(text) })
	must(t, err)
	newBase, err := newer.Debian(ctx)
	must(t, err)
	newApp, err := newer.App(ctx, 1)
	must(t, err)
	images := []pythonImage{
		{"3.11", []*image.Layer{base, apps[1]}, inputs.Imports},
		{"3.13", []*image.Layer{newBase, newApp}, "import django.db.models, requests, attrs"},
	}
	if os.Getenv("DEDUP_LONG") == "" {
		return images
	}
	older, err := inputs.OpenOlder(func(text string) { t.Log(text) })
	must(t, err)
	oldBase, err := older.Debian(ctx)
	must(t, err)
	return append(images, pythonImage{"3.9", []*image.Layer{oldBase},
		"import asyncio, email.mime.text, http.server, json, logging.config, sqlite3, unittest.mock, xml.sax"})
}

// Every compiled file that is valid for Python with overlayfs is valid for it with dedup, in a container with
// a read-only root, and importing the packages compiles nothing.
func TestPythonUsesItsBytecode(t *testing.T) {
	t.Parallel()
	for _, fidelity := range []content.Fidelity{content.Python, content.Normalized} {
		n := startDedup(t, node.Options{Daemon: map[string]any{"fidelity": string(fidelity)}})
		r := startRegistry(t)
		for _, img := range pythonImages(t) {
			t.Run(fmt.Sprintf("%s/%s", fidelity, img.name), func(t *testing.T) {
				ref := pushDemo(t, r, "python/"+img.name+":1", img.layers...)
				found := map[string]bytecode{}
				for _, snapshotter := range []string{node.Snapshotter, "overlayfs"} {
					pull(t, n, snapshotter, ref)
					out, err := readOnly(testContext(t), n, snapshotter, ref, "python3", "-c", checkBytecode)
					must(t, err)
					var b bytecode
					must(t, json.Unmarshal([]byte(out), &b))
					found[snapshotter] = b
				}
				got, want := found[node.Snapshotter], found["overlayfs"]
				t.Logf("%d valid, %d by hash, %d stale, %d without", got.Valid, got.Hashed, len(got.Stale), len(got.Missing))
				if got.Valid != want.Valid || got.Valid < 400 || len(got.Stale) != len(want.Stale) ||
					len(got.Missing) != len(want.Missing) {
					t.Errorf("with overlayfs it is %d valid, %d stale, %d without; stale here: %q", want.Valid, len(want.Stale),
						len(want.Missing), got.Stale)
				}
				importsCompileNothing(t, n, ref, img.imports)
			})
		}
	}
}

// readOnly runs a command in a container whose root file system cannot be written.
func readOnly(ctx context.Context, n *node.Node, snapshotter, ref string, command ...string) (string, error) {
	return n.RunWith(ctx, snapshotter, []string{"--read-only"}, ref, command...)
}

var (
	fromBytecode = regexp.MustCompile(`(?m)^# code object from '[^']*\.pyc'`)
	fromSource   = regexp.MustCompile(`(?m)^# (?:code object from '?[^'\s]*\.py'?$|wrote .*|bytecode is stale .*)`)
)

func importsCompileNothing(t *testing.T, n *node.Node, ref, program string) {
	t.Helper()
	out, err := readOnly(testContext(t), n, node.Snapshotter, ref, "sh", "-c", "python3 -v -c '"+program+"' 2>&1")
	must(t, err)
	if used := len(fromBytecode.FindAllString(out, -1)); used < 100 {
		t.Errorf("only %d modules came from bytecode:\n%s", used, tailOf(out))
	}
	if compiled := fromSource.FindAllString(out, -1); len(compiled) > 0 {
		t.Errorf("Python compiled: %q", compiled)
	}
}

func tailOf(text string) string { return text[max(0, len(text)-2000):] }

// edited runs a program of the image after something has changed the module, and says what Python ran.
const (
	edited     = "/usr/local/lib/python3.11/dist-packages/six.py"
	showEdited = `python3 -c "import six; print(six.__version__)"`
)

// Whatever changes a source, the new code runs: an edit in a container, a layer above, a package upgraded by pip.
func TestPythonRunsNewCode(t *testing.T) {
	t.Parallel()
	base, apps := demoImages(t)
	n, r := startDedup(t, node.Options{}), startRegistry(t)
	ref := pushDemo(t, r, "edit/app:1", base, apps[0])
	pull(t, n, node.Snapshotter, ref)
	ctx := testContext(t)
	source, err := n.Run(ctx, node.Snapshotter, ref, "cat", edited)
	must(t, err)
	version := regexp.MustCompile(`__version__ = "([^"]*)"`).FindStringSubmatch(source)
	if version == nil {
		t.Fatalf("six has no version:\n%s", source[:500])
	}
	changed := strings.Replace(source, version[0], `__version__ = "`+strings.Repeat("9", len(version[1]))+`"`, 1)
	nines := strings.Repeat("9", len(version[1])) + "\n"

	out, err := n.Run(ctx, node.Snapshotter, ref, "sh", "-c", "sed -i 's/"+version[1]+"/"+
		strings.Repeat("9", len(version[1]))+"/' "+edited+" && "+showEdited)
	must(t, err)
	if out != nines {
		t.Errorf("edited in a container: %q", out)
	}
	upgradedByPip(t, n, ref)
	shown := int64(content.SourceTime(sha256.Sum256([]byte(source))))
	for name, mtime := range map[string]int64{
		"newer": 1_900_000_000, "older": 1_000_000, "after what the old one shows": shown + 1, "before 1970": 0,
	} {
		t.Run(name, func(t *testing.T) {
			e := image.File(strings.TrimPrefix(edited, "/"), changed)
			e.Time = time.Unix(mtime, 0)
			child := pushDemo(t, r, "edit/"+strings.ReplaceAll(name, " ", "-")+":1", base, apps[0], layer(t, e))
			pull(t, n, node.Snapshotter, child)
			for range 2 { // the second has no bytecode of the first
				out, err := n.Run(testContext(t), node.Snapshotter, child, "sh", "-c", showEdited)
				must(t, err)
				if out != nines {
					t.Errorf("replaced in a layer above, mtime %d: %q", mtime, out)
				}
			}
		})
	}
}

// upgradedByPip lets pip put another release of a package into a container.
func upgradedByPip(t *testing.T, n *node.Node, ref string) {
	t.Helper()
	set, err := inputs.Open(func(text string) { t.Log(text) })
	must(t, err)
	wheels, err := set.Wheels(testContext(t))
	must(t, err)
	pip := "python3 /mnt/" + inputs.Pip +
		" install --quiet --root-user-action=ignore --no-index --no-deps --break-system-packages --find-links /mnt/" +
		inputs.OlderWheels
	out, err := n.RunWith(testContext(t), node.Snapshotter,
		[]string{"--mount", "type=bind,src=" + wheels + ",dst=/mnt,options=rbind:ro"}, ref,
		"sh", "-c", showEdited+" && "+pip+" six==1.16.0 && "+showEdited)
	must(t, err)
	if got := strings.Fields(out); len(got) != 2 || got[0] == got[1] || got[1] != "1.16.0" {
		t.Errorf("before and after pip: %q", got)
	}
}

// normalized shows the owner of the image that came first, python that of the image itself: what the docs say.
func TestNormalizedOwnership(t *testing.T) {
	t.Parallel()
	entry := func(uid int) image.Entry {
		e := payload("owned", "srv/file", 9000)
		e.UID, e.GID, e.Time = uid, uid, time.Unix(1_700_000_000+int64(uid), 0)
		return e
	}
	bb, first, second := busybox(t), layer(t, entry(0)), layer(t, entry(1000))
	for fidelity, want := range map[content.Fidelity]string{content.Exact: "1000 1700001000\n",
		content.Python: "1000 1700001000\n", content.Normalized: "0 1700000000\n"} {
		n, r := startDedup(t, node.Options{Daemon: map[string]any{"fidelity": string(fidelity)}}), startRegistry(t)
		pull(t, n, node.Snapshotter, push(t, r, "one:1", bb, first))
		ref := push(t, r, "two:1", bb, second)
		pull(t, n, node.Snapshotter, ref)
		out, err := n.Run(testContext(t), node.Snapshotter, ref, "stat", "-c", "%u %Y", "/srv/file")
		must(t, err)
		if out != want {
			t.Errorf("%s: the second image's file says %q, want %q", fidelity, out, want)
		}
	}
}
