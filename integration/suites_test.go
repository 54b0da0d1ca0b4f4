package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/machine"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/node"
)

// suiteTime bounds one run of a suite.
const suiteTime = 15 * time.Minute

// idMapped is why TestIDMappedOverlay fails with dedup alone; TestUserNamespace is dedup's own.
const idMapped = "the test takes all that follows lowerdir= for one path and wants that not to exist, as the " +
	"paths of several layers do not; dedup has one"

// knownDifferences are tests that fail with dedup alone for a reason that is not dedup's.
var knownDifferences = map[string]string{
	"TestSnapshotterClient/Rename": "the suite leaves it out for a snapshotter of the name overlayfs; " +
		"no overlay mount can rename a directory of a lower layer",
	"TestIDMappedOverlay/TestIDMappedOverlay-SingleMapping":                idMapped,
	"TestIDMappedOverlay/TestIDMappedOverlay-MultiMapping":                 idMapped,
	"TestIDMappedOverlay/TestIDMappedOverlay-SingleMapping-ParallelUnpack": idMapped,
}

// TestContainerdSuites runs containerd's integration suites on overlayfs and on dedup: what passes with the one passes
// with the other. `make test-containerd` does so. DEDUP_SUITE_ONLY, a regular expression, chooses among the tests;
// DEDUP_SUITE_LOGS names a directory that takes what each run has said.
func TestContainerdSuites(t *testing.T) {
	if os.Getenv("DEDUP_CONTAINERD") == "" {
		t.Skip("takes half an hour: make test-containerd")
	}
	for _, suite := range []string{"client", "cri"} {
		t.Run(suite, func(t *testing.T) { compareSuite(t, suite) })
	}
}

// TestCritest runs the tests of cri-tools likewise.
func TestCritest(t *testing.T) {
	if os.Getenv("DEDUP_CONTAINERD") == "" {
		t.Skip("takes ten minutes: make test-containerd")
	}
	compareSuite(t, "critest")
}

// results are a suite's tests with "pass", "fail" or "skip".
type results map[string]string

// compareSuite runs a suite on both snapshotters, repeats what fails with dedup alone once, and prints a table.
func compareSuite(t *testing.T, suite string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: containerd, mounts and runc do")
	}
	sweepSuites(t)
	s := prepareSuite(t, suite)
	found := map[string]results{}
	for _, snapshotter := range beside {
		started := time.Now()
		s.Snapshotter = snapshotter
		found[snapshotter] = s.inCell(t)
		t.Logf("%s on %s took %s", suite, snapshotter, time.Since(started).Round(time.Second))
	}
	overlay, dedup := found[beside[0]], found[beside[1]]
	note := s.repeat(t, overlay, dedup)
	t.Log(suiteTable(suite, overlay, dedup, note))
	for _, name := range failsAlone(overlay, dedup) {
		t.Errorf("with dedup alone: %s: %q", name, dedup[name])
	}
}

// failsAlone are the tests that pass with overlayfs and not with dedup, or fail with dedup alone, but for known ones.
func failsAlone(overlay, dedup results) (names []string) {
	all := maps.Clone(overlay)
	maps.Copy(all, dedup)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		worse := overlay[name] == "pass" && dedup[name] != "pass" || dedup[name] == "fail" && overlay[name] != "fail"
		if worse && knownDifferences[name] == "" && !knownBelow(dedup, name) {
			names = append(names, name)
		}
	}
	return names
}

// repeat runs what fails with dedup alone once more, each test by itself, unless that is a large part of the suite. It
// changes the results of what passes then, and returns a note for each.
func (s suiteRun) repeat(t *testing.T, overlay, dedup results) map[string]string {
	t.Helper()
	const most = 10
	note, again := map[string]string{}, map[string]bool{}
	for _, name := range failsAlone(overlay, dedup) {
		again[s.topLevel(name)] = true
	}
	if len(again) > most {
		return note
	}
	for _, top := range slices.Sorted(maps.Keys(again)) {
		if s.Only = regexp.QuoteMeta(top) + "$"; s.Suite != "critest" {
			s.Only = "^" + s.Only
		}
		for name, result := range s.inCell(t) {
			if dedup[name] != "pass" && result == "pass" && s.topLevel(name) == top {
				dedup[name], note[name] = "pass", "passed when it ran alone"
			}
		}
	}
	return note
}

// knownBelow tells whether a test fails only for subtests whose failure is known.
func knownBelow(r results, name string) bool {
	failed := false
	for sub, result := range r {
		if strings.HasPrefix(sub, name+"/") && result == "fail" {
			if failed = true; knownDifferences[sub] == "" {
				return false
			}
		}
	}
	return failed
}

// topLevel is what has to run for a test to run.
func (s suiteRun) topLevel(name string) string {
	if s.Suite == "critest" {
		return name
	}
	top, _, _ := strings.Cut(name, "/")
	return top
}

// prepareSuite builds all that a run needs, before the network is gone.
func prepareSuite(t *testing.T, suite string) suiteRun {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	say := func(text string) { t.Log(text) }
	s := suiteRun{Suite: suite, Only: os.Getenv("DEDUP_SUITE_ONLY")}
	var err error
	s.Suites, err = node.BuildSuites(ctx, say)
	must(t, err)
	if suite == "critest" {
		s.Critest, err = node.BuildCritest(ctx, say)
		must(t, err)
	}
	s.CNI, err = node.BuildCNI(ctx, say)
	must(t, err)
	s.Runc, err = node.BuildRunc(ctx, say)
	must(t, err)
	_, err = node.Build(ctx, node.DefaultVersion, say)
	must(t, err)
	must(t, node.Require(ctx, say, node.Command{Name: "mkfs.xfs", Packages: "xfsprogs"},
		node.Command{Name: "pkill", Packages: "procps"}, node.Command{Name: "iptables", Packages: "iptables"}))
	busybox(t)
	return s
}

// inCell runs the suite and returns its results.
func (s suiteRun) inCell(t *testing.T) results {
	t.Helper()
	var err error
	s.Dir, err = os.MkdirTemp("", fmt.Sprintf("%s%d-", suitePrefix, os.Getpid())) // a short path: sockets lie below it
	must(t, err)
	defer func() {
		if keep := os.Getenv("DEDUP_SUITE_LOGS"); keep != "" {
			keepLogs(t, s, keep)
		}
		must(t, os.RemoveAll(s.Dir))
	}()
	must(t, os.Chmod(s.Dir, 0o711))
	self, err := os.Executable()
	must(t, err)
	text, err := json.Marshal(s)
	must(t, err)
	out, err := os.Create(s.path("cell.log"))
	must(t, err)
	defer out.Close()
	ctx, cancel := context.WithTimeout(t.Context(), suiteTime+2*time.Minute)
	defer cancel()
	failure := machine.Cell(ctx, s.Dir, out, append(os.Environ(), suiteVariable+"="+string(text)),
		self, "-test.run", "^TestInsideCell$", "-test.v", "-test.timeout", "0")
	if errors.Is(failure, node.ErrMissing) {
		t.Skip(failure)
	}
	found, err := s.results()
	if err != nil || len(found) == 0 || failure != nil {
		cell, _ := os.ReadFile(s.path("cell.log"))
		said, _ := os.ReadFile(s.path("suite.log"))
		t.Fatalf("%s on %s ran %d tests: %v, %v\n%s\n%s", s.Suite, s.Snapshotter, len(found), failure, err,
			cell[max(0, len(cell)-4000):], said[max(0, len(said)-2000):])
	}
	return found
}

const suitePrefix = "suite-"

// sweepSuites removes what processes left that died before they could.
func sweepSuites(t *testing.T) {
	t.Helper()
	old, err := filepath.Glob(filepath.Join(os.TempDir(), suitePrefix+"[0-9]*-*"))
	must(t, err)
	for _, dir := range old {
		pid, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(dir), suitePrefix), "-")
		if _, err := os.Stat("/proc/" + pid); os.IsNotExist(err) {
			must(t, os.RemoveAll(dir))
		}
	}
}

// keepLogs copies a run's logs to where DEDUP_SUITE_LOGS wants them.
func keepLogs(t *testing.T, s suiteRun, dir string) {
	t.Helper()
	to := filepath.Join(dir, fmt.Sprintf("%s-%s-%d", s.Suite, s.Snapshotter, time.Now().Unix()))
	must(t, os.MkdirAll(to, 0o755))
	for _, name := range []string{"cell.log", "suite.log", "containerd.log", "dedup.log", "daemons/log", "report.json"} {
		if text, err := os.ReadFile(s.path(name)); err == nil {
			must(t, os.WriteFile(filepath.Join(to, filepath.Base(name)), text, 0o600))
		}
	}
}

// testLine is a line of a test binary that runs with -test.v=test2json.
var testLine = regexp.MustCompile(`(?m)\x16 *(=== RUN  |--- PASS:|--- FAIL:|--- SKIP:) +(\S+)`)

// results reads what the suite has said. A test that has begun and not ended has failed.
func (s suiteRun) results() (results, error) {
	if s.Suite == "critest" {
		return s.critestResults()
	}
	text, err := os.ReadFile(s.path("suite.log"))
	if err != nil {
		return nil, err
	}
	found := results{}
	for _, m := range testLine.FindAllStringSubmatch(string(text), -1) {
		switch m[1] {
		case "=== RUN  ":
			found[m[2]] = "fail"
		default:
			found[m[2]] = strings.ToLower(m[1][4:8])
		}
	}
	return found, nil
}

// A test that has begun and does not end, as when its binary panics, has failed; what a test prints counts for nothing.
func TestSuiteResults(t *testing.T) {
	s := suiteRun{Suite: "client", Dir: t.TempDir()}
	const said = "\x16=== RUN   TestA\n\x16=== RUN   TestA/sub\n--- FAIL: TestA (0s)\n" +
		"loud\x16    --- PASS: TestA/sub (0.00s)\n" +
		"\x16--- PASS: TestA (0.10s)\n\x16=== RUN   TestB\n\x16--- SKIP: TestB (0.00s)\n\x16=== RUN   TestC\npanic: no\n"
	must(t, os.WriteFile(s.path("suite.log"), []byte(said), 0o600))
	got, err := s.results()
	must(t, err)
	want := results{"TestA": "pass", "TestA/sub": "pass", "TestB": "skip", "TestC": "fail"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// What fails with dedup alone is found, unless it is known or only what is known fails below it.
func TestFailsAlone(t *testing.T) {
	const known, parent = "TestSnapshotterClient/Rename", "TestSnapshotterClient"
	overlay := results{"TestA": "pass", "TestB": "fail", "TestC": "skip", "TestD": "pass", parent: "pass", known: "pass"}
	dedup := results{"TestA": "fail", "TestB": "fail", "TestC": "fail", parent: "fail", known: "fail"}
	if diff := cmp.Diff([]string{"TestA", "TestC", "TestD"}, failsAlone(overlay, dedup)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	dedup[parent+"/Other"] = "fail"
	want := []string{"TestA", "TestC", "TestD", parent, parent + "/Other"}
	if diff := cmp.Diff(want, failsAlone(overlay, dedup)); diff != "" {
		t.Errorf("with another failure beside a known one (-want +got):\n%s", diff)
	}
}

func (s suiteRun) critestResults() (results, error) {
	text, err := os.ReadFile(s.path("report.json"))
	if err != nil {
		return nil, err
	}
	var suites []struct {
		SpecReports []struct {
			ContainerHierarchyTexts           []string
			LeafNodeType, LeafNodeText, State string
		}
	}
	if err := json.Unmarshal(text, &suites); err != nil {
		return nil, fmt.Errorf("read critest's report: %w", err)
	}
	found := results{}
	for _, suite := range suites {
		for _, spec := range suite.SpecReports {
			if spec.LeafNodeType != "It" {
				continue
			}
			result := "fail"
			switch spec.State {
			case "passed":
				result = "pass"
			case "skipped", "pending":
				result = "skip"
			}
			found[strings.Join(append(spec.ContainerHierarchyTexts, spec.LeafNodeText), " ")] = result
		}
	}
	return found, nil
}

// suiteTable counts the tests, without subtests, and names those whose results differ, or that fail with both.
func suiteTable(suite string, overlay, dedup results, note map[string]string) string {
	var out strings.Builder
	fmt.Fprintf(&out, "table:\n| %s | passed | failed | skipped |\n| --- | --- | --- | --- |\n", suite)
	for i, r := range []results{overlay, dedup} {
		count := map[string]int{}
		for name, result := range r {
			if suite == "critest" || !strings.Contains(name, "/") {
				count[result]++
			}
		}
		fmt.Fprintf(&out, "| %s | %d | %d | %d |\n", beside[i], count["pass"], count["fail"], count["skip"])
	}
	all := maps.Clone(overlay)
	maps.Copy(all, dedup)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		a, b := overlay[name], dedup[name]
		why := strings.TrimSpace(note[name] + " " + knownDifferences[name])
		if b == "fail" && knownBelow(dedup, name) {
			why = "only what is known below it"
		}
		switch {
		case a != b || why != "":
			fmt.Fprintf(&out, "%s: overlayfs %q, dedup %q. %s\n", name, a, b, why)
		case a == "fail":
			fmt.Fprintf(&out, "%s: fails with both\n", name)
		}
	}
	return out.String()
}
