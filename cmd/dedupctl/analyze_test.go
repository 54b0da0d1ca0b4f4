package main

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedupctl/internal/inventory"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/registry"
)

// twoBuilds are images on one base, whose other layer has the same file twice and one of its own.
func twoBuilds(t *testing.T) (base *image.Layer, apps [2]*image.Layer) {
	t.Helper()
	build := func(entries ...image.Entry) *image.Layer {
		l, err := image.FromEntries(t.TempDir(), image.LayerOptions{}, entries...)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	base = build(image.Dir("lib"), image.File("lib/base", strings.Repeat("base", 5000)))
	for i := range apps {
		apps[i] = build(image.Dir("srv"), image.File("srv/same", strings.Repeat("same", 10_000)),
			image.File("srv/too", strings.Repeat("same", 10_000)),
			image.File("srv/own", strings.Repeat(fmt.Sprint(i), 5000)))
	}
	return base, apps
}

// What analyze takes for the kernel is in its output: what was tried, else what is assumed.
func TestAnalyzeSaysItsKernel(t *testing.T) {
	for _, row := range []struct {
		name string
		a    Analysis
		says string
	}{
		{"tried", Analysis{Dense: true}, ""},
		{"not tried", Analysis{Dense: true, Assumed: "operation not permitted"}, "as root, analyze tries it"},
		{"refused", Analysis{}, "This kernel does not mount packs with blocks of 512 bytes"},
	} {
		t.Run(row.name, func(t *testing.T) {
			row.a.Images = []AnalysisImage{{}}
			var b strings.Builder
			writeAnalysis(&b, row.a)
			if says := strings.Contains(b.String(), "blocks of 512 bytes"); says != (row.says != "") ||
				!strings.Contains(b.String(), row.says) {
				t.Error(b.String())
			}
		})
	}
}

// Root tries the kernel, and leaves nothing; others are told why not.
func TestAnalyzeTriesKernel(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	var a analysis
	a.tryKernel()
	if left, err := os.ReadDir(os.TempDir()); err != nil || len(left) > 0 {
		t.Error("left: ", left, err)
	}
	if root := os.Geteuid() == 0; !root && (!a.out.Dense || a.out.Assumed == "") {
		t.Errorf("without root: dense %t, %q", a.out.Dense, a.out.Assumed)
	}
	t.Logf("dense %t, assumed: %q", a.out.Dense, a.out.Assumed)
}

// analyzed runs analyze in this process.
func analyzed(t *testing.T, args ...string) (a Analysis) {
	t.Helper()
	code, out, errs := dedupctl(t, append([]string{"analyze", "--json"}, args...)...)
	if err := json.Unmarshal([]byte(out), &a); err != nil || code != exitOK || errs != "" {
		t.Fatal(code, err, out, errs)
	}
	return a
}

// checkTwoBuilds checks what does not depend on where the images lie.
func checkTwoBuilds(t *testing.T, a Analysis) {
	t.Helper()
	// 20,000 bytes for the base, 40,000 for all that is the same, and two times 5,000; a pack for each layer has four
	// blocks more. In dense packs 40,000 and 5,000 share a block, and there are two more.
	want := AnalysisUsage{5*4096 + 10*4096 + 2*2*4096 + 3*4*4096, 3}
	if a.Dense {
		want.Bytes = 5*4096 + 12*4096 + 2*4096 + 3*2*4096
	}
	if a.Python.Packs != want || a.File.Packs != want {
		t.Errorf("packs %+v and %+v, want %+v", a.File.Packs, a.Python.Packs, want)
	}
	if a.Layers != 3 || a.DiffIDs != 3 || a.Python.Trees.Inodes != 3 || a.Python.ChainImages.Inodes != 2 ||
		a.DeepestLowerdirs != 2 || len(a.Images) != 2 {
		t.Errorf("%+v", a)
	}
	// Every file, and the root and one more directory of each layer.
	if want := (AnalysisUsage{5*4096 + 2*(2*10+2)*4096 + 6*4096, 13}); a.Now != want || a.Layer != want {
		t.Errorf("now %+v, by layer %+v, want %+v", a.Now, a.Layer, want)
	}
	if d := cmp.Diff([]AnalysisPrefix{{Path: "srv", Bytes: 3 * 10 * 4096, Files: 3}}, a.Duplicates); d != "" {
		t.Error(d)
	}
}

func TestAnalyzeReferences(t *testing.T) {
	base, apps := twoBuilds(t)
	r, err := registry.Start(registry.Options{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var refs []string
	for i, app := range apps {
		img, err := image.New(image.Options{}, base, app)
		if err != nil {
			t.Fatal(err)
		}
		refs = append(refs, r.Ref(fmt.Sprintf("app:%d", i+1)))
		if err := image.Push(t.Context(), refs[i], img); err != nil {
			t.Fatal(err)
		}
	}
	a := analyzed(t, refs...)
	checkTwoBuilds(t, a)
	if names := a.Images[1].Names; !slices.Equal(names, refs[1:]) || len(a.Sources) != 1 ||
		a.Sources[0].Kind != "registry" {
		t.Errorf("%+v", a)
	}
	fetched, err := r.Fetched()
	if err != nil {
		t.Fatal(err)
	}
	times := 0
	for _, h := range fetched {
		if h == base.Hash {
			times++
		}
	}
	if times != 1 {
		t.Errorf("the base was fetched %d times", times)
	}
	code, out, errs := dedupctl(t, append([]string{"analyze"}, refs...)...)
	for _, want := range []string{"registry: 2 images of 3 layers", "now, as overlayfs", "and Python's bytecode", "/srv ",
		"The deepest image stacks 2 lower directories"} {
		if code != exitOK || errs != "" || !strings.Contains(out, want) {
			t.Errorf("exit code %d, %s; %q is not in\n%s", code, errs, want, out)
		}
	}
	damaged := filepath.Join(r.Dir(), "sha256", apps[1].Hash.Hex)
	if err := os.Truncate(damaged, 100); err != nil {
		t.Fatal(err)
	}
	code, out, errs = dedupctl(t, append([]string{"analyze"}, refs...)...)
	if code != exitFailure || !strings.Contains(errs, "1 image left out") ||
		!strings.Contains(out, "left out: "+refs[1]) || !strings.Contains(out, "now, as overlayfs") {
		t.Errorf("exit code %d\n%s%s", code, out, errs)
	}
	if code, _, errs := dedupctl(t, "analyze", r.Ref("no/such:image")); code != exitFailure ||
		!strings.Contains(errs, "no/such:image") {
		t.Errorf("exit code %d: %s", code, errs)
	}
}

func TestAnalyzeLayout(t *testing.T) {
	base, apps := twoBuilds(t)
	dir := t.TempDir()
	path, err := layout.Write(filepath.Join(dir, "layout"), empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	for i, app := range apps {
		img, err := image.New(image.Options{}, base, app)
		if err != nil {
			t.Fatal(err)
		}
		name := map[string]string{"org.opencontainers.image.ref.name": fmt.Sprint("v", i)}
		if err := path.AppendImage(img, layout.WithAnnotations(name)); err != nil {
			t.Fatal(err)
		}
	}
	tarred := filepath.Join(dir, "layout.tar")
	writeTar(t, tarred, filepath.Join(dir, "layout"))
	for _, source := range []string{filepath.Join(dir, "layout"), tarred} {
		a := analyzed(t, source)
		checkTwoBuilds(t, a)
		if !slices.Equal(a.Images[1].Names, []string{"v1"}) || a.Sources[0].Kind != "OCI layout" {
			t.Errorf("%s: %+v", source, a)
		}
	}
	// fs-verity: a descriptor for each of three packs, and a block of hashes.
	plain, verity := analyzed(t, tarred), analyzed(t, "--verity", tarred)
	if more := verity.Python.Packs.Bytes - plain.Python.Packs.Bytes; more != 6*4096 || verity.Now != plain.Now {
		t.Errorf("fs-verity takes %d bytes", more)
	}
	// Two sources are analysed together: nothing is there twice that has the same diffID.
	both := analyzed(t, filepath.Join(dir, "layout"), tarred)
	if both.Layers != 6 || both.DiffIDs != 3 || both.Layer.Bytes*2 != both.Now.Bytes ||
		both.Python.ChainImages.Inodes != 2 {
		t.Errorf("%+v", both)
	}
}

// A blob that is not what its image says is no layer of that image.
func TestAnalyzeRefusesOtherBlobs(t *testing.T) {
	base, apps := twoBuilds(t)
	dir := t.TempDir()
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	img, err := image.New(image.Options{}, base, apps[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := path.AppendImage(img); err != nil {
		t.Fatal(err)
	}
	blob, err := os.ReadFile(apps[1].File)
	if err != nil {
		t.Fatal(err)
	}
	target := filepath.Join(dir, "blobs/sha256", apps[0].Hash.Hex)
	if err := os.Chmod(target, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(target, blob, 0o644); err != nil {
		t.Fatal(err)
	}
	code, out, errs := dedupctl(t, "analyze", dir)
	if code != exitFailure || !strings.Contains(errs, "has the diffID "+apps[1].Diff.String()) ||
		!strings.Contains(out, "no images there") {
		t.Errorf("exit code %d\n%s%s", code, out, errs)
	}
}

func TestAnalyzeErrors(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, []byte("no tar"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{dir}, exitFailure, "no index.json (OCI layout)"},
		{[]string{filepath.Join(dir, "none")}, exitFailure, "no such file"},
		{[]string{plain}, exitFailure, "is no tar"},
		{[]string{"/dev/null"}, exitFailure, "neither a directory nor a file"},
		{[]string{"NoRef:x:y"}, exitFailure, "no path that exists, and no image reference"},
		{[]string{"127.0.0.1:1/app:1"}, exitFailure, "127.0.0.1:1/app:1"},
		{[]string{"--platform", "linux/", dir}, exitUsage, "--platform linux/"},
		{[]string{dir, "--json"}, exitUsage, "--json stands behind an argument: flags come first"},
		{[]string{"--nonsense"}, exitUsage, "see --help"},
	} {
		if code, out, errs := dedupctl(t, append([]string{"analyze"}, row.args...)...); code != row.code || out != "" ||
			!strings.Contains(errs, row.want) {
			t.Errorf("%v: exit code %d, want %d with %q: %s%s", row.args, code, row.code, row.want, out, errs)
		}
	}
}

// A stack too deep for a mount's options is pointed out.
func TestAnalyzeDeepImage(t *testing.T) {
	base, _ := twoBuilds(t)
	dir := t.TempDir()
	layers := []*image.Layer{base}
	for i := range deepStack {
		l, err := image.FromEntries(dir, image.LayerOptions{}, image.File(fmt.Sprint("file-", i), "x"))
		if err != nil {
			t.Fatal(err)
		}
		layers = append(layers, l)
	}
	path, err := layout.Write(filepath.Join(dir, "layout"), empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{deepStack, deepStack + 1} {
		img, err := image.New(image.Options{}, layers[:n]...)
		if err != nil {
			t.Fatal(err)
		}
		if err := path.AppendImage(img); err != nil {
			t.Fatal(err)
		}
	}
	if a := analyzed(t, string(path)); a.DeepestLowerdirs != deepStack+1 || a.DeepImages != 1 || a.Layers != deepStack+1 {
		t.Errorf("%d deep, %d images, %d layers", a.DeepestLowerdirs, a.DeepImages, a.Layers)
	}
	if _, out, _ := dedupctl(t, "analyze", string(path)); !strings.Contains(out, "The deepest image stacks 101 lower "+
		"directories") ||
		!strings.Contains(out, "1 image has more than 100.") {
		t.Error(out)
	}
}

func TestAnalyzeProgress(t *testing.T) {
	a := newAnalysis([]*inventory.Inventory{{Layers: []inventory.Layer{{Size: 3000}, {Size: 1000}}}})
	a.read.Add(1000)
	if got, want := a.progress(5e9), "1.00 kB of 4.00 kB read (25 %), about 15s left"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	a.done.Store(true)
	if got, want := a.progress(5e9), "1.00 kB read; making the chain images"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestRemaining(t *testing.T) {
	for _, row := range []struct {
		done, total int64
		want        string
	}{{0, 10, ""}, {10, 10, ""}, {1, 4, ", about 30s left"}} {
		if got := remaining(10e9, row.done, row.total); got != row.want {
			t.Errorf("%d of %d: %q, want %q", row.done, row.total, got, row.want)
		}
	}
}

func writeTar(t *testing.T, path, dir string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(f)
	if err := errors.Join(w.AddFS(os.DirFS(dir)), w.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
}
