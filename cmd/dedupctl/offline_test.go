package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// While the daemon is down, fsck and gc --dry-run read the store themselves; what changes it says that it needs one.
func TestOffline(t *testing.T) {
	r := newRig(t)
	config := filepath.Join(filepath.Dir(r.ctl), "config.toml")
	stop := r.start(t)
	r.commit(t, "one", 0)
	// A daemon that does not listen where dedupctl looks is not read behind its back.
	code, _, errs := r.run(t, "fsck", "--config", config, "--address", r.socket+".other")
	if code != exitFailure || !strings.Contains(errs, "name its socket with --address") {
		t.Error(code, errs)
	}
	stop()
	code, out, errs := r.run(t, "fsck", "--config", config)
	if code != exitOK || out != "nothing damaged, nothing unused\n" || !strings.Contains(errs, "reading "+r.root) {
		t.Error(code, out, errs)
	}
	code, out, _ = r.run(t, "gc", "--dry-run", "--config", config)
	if code != exitOK || !strings.HasPrefix(out, "nothing to remove") {
		t.Error(code, out)
	}
	for _, verb := range []string{"fsck --repair", "gc"} {
		code, _, errs := r.run(t, append(strings.Fields(verb), "--config", config)...)
		if code != exitFailure || !strings.Contains(errs, "needs the daemon") || !strings.Contains(errs, "systemctl start") {
			t.Error(verb, code, errs)
		}
	}
	code, _, errs = r.run(t, "fsck", "--config", filepath.Join(t.TempDir(), "none"))
	_, err := os.Stat(defaultRoot)
	if err != nil && (code != exitFailure || !strings.Contains(errs, defaultRoot+" holds no store")) {
		t.Error(code, errs)
	}
	checkRefused(t, r, config)
}

// checkRefused: the daemon refuses a damaged metadata.db, and what is damaged beside it is found without the daemon.
func checkRefused(t *testing.T, r *rig, config string) {
	packs, err := filepath.Glob(filepath.Join(r.root, "packs", "*"))
	if err != nil || len(packs) != 1 {
		t.Fatal(packs, err)
	}
	b, err := os.ReadFile(packs[0])
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(b, []byte("xxxx"))
	b[at] ^= 1
	err = errors.Join(os.WriteFile(packs[0], b, 0o400),
		os.WriteFile(filepath.Join(r.root, "metadata.db"), []byte("garbage"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	code, out, _ := r.run(t, "fsck", "--json", "--config", config)
	var report FsckReport
	if err := json.Unmarshal([]byte(out), &report); err != nil || code != exitDamage {
		t.Fatal(code, err)
	}
	kinds := map[string]bool{}
	for _, f := range report.Findings {
		kinds[f.Kind] = true
	}
	if !report.Offline || report.Damaged != 2 || !kinds["metadata"] || !kinds["object"] {
		t.Errorf("%+v", report)
	}
	code, _, errs := r.run(t, "gc", "--dry-run", "--config", config)
	if code != exitFailure || !strings.Contains(errs, "put the file back from a backup") {
		t.Error(code, errs)
	}
}
