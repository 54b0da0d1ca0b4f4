package vm

import (
	"crypto/md5"
	_ "embed"
	"encoding/hex"
	"fmt"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/dedup-snapshotter/dedup-snapshotter/integration/image"
	"github.com/dedup-snapshotter/dedup-snapshotter/integration/inputs"
)

//go:embed switch.sh
var switchScript string

// payloads are the files of /data in an image, by name.
type payloads map[string]string

// small are files of which many take less of the disk in a dense pack.
func small(prefix string, n int) payloads {
	p := payloads{}
	for i := range n {
		p[fmt.Sprintf("%s%03d", prefix, i)] = strings.Repeat(fmt.Sprintf("%s %d\n", prefix, i), 130+i)
	}
	return p
}

// sum is what `cat /data/* | md5sum` prints.
func (p payloads) sum() string {
	h := md5.New()
	for _, name := range slices.Sorted(maps.Keys(p)) {
		h.Write([]byte(p[name]))
	}
	return hex.EncodeToString(h.Sum(nil))
}

// and returns the payloads of both.
func (p payloads) and(more payloads) payloads {
	all := maps.Clone(p)
	maps.Copy(all, more)
	return all
}

// save writes an image of busybox and the payloads.
func (p payloads) save(t *testing.T, path, ref string) {
	t.Helper()
	entries, err := inputs.Busybox(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	entries = append(entries, image.Dir("data"))
	for _, name := range slices.Sorted(maps.Keys(p)) {
		entries = append(entries, image.File("data/"+name, p[name]))
	}
	l, err := image.FromEntries(t.TempDir(), image.LayerOptions{}, entries...)
	if err != nil {
		t.Fatal(err)
	}
	img, err := image.New(image.Options{}, l)
	if err == nil {
		err = image.WriteLayout(path, ref, img)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// boot is one start of the machine; what it sets for the script is in switch.sh.
type boot struct {
	suite       string
	imports     string
	run         string
	coarse      bool
	full        bool
	packs, mode string // what the packs become, in words, and the mode
}

// said is what one boot has printed, by its words; there may be several lines of image.
type said map[string][]string

func (s said) one(t *testing.T, word string) string {
	t.Helper()
	if len(s[word]) != 1 {
		t.Fatalf("said %q of %s", s[word], word)
	}
	return s[word][0]
}

// switcher is a machine whose disk stays while its kernels change.
type switcher struct {
	opts   Options
	images map[string]payloads
	boots  int
}

func newSwitcher(t *testing.T, images map[string]payloads) *switcher {
	t.Helper()
	s := &switcher{opts: Options{Dir: t.TempDir(), Files: nodeFiles(t, kernelFor(t, Trixie)), FS: Ext4}, images: images}
	for name, p := range images {
		tar := filepath.Join(t.TempDir(), name+".tar")
		p.save(t, tar, "docker.io/test/"+name+":1")
		s.opts.Files[name+".tar"] = tar
	}
	disk, err := MakeDisk(t.Context(), s.opts)
	if err != nil {
		t.Fatal(err)
	}
	s.opts.Disk = disk
	return s
}

// start boots a kernel, and compares what containers see with what they should.
func (s *switcher) start(t *testing.T, b boot) said {
	t.Helper()
	s.boots++
	yes := map[bool]string{false: "no", true: "yes"}
	s.opts.Kernel, s.opts.Dir = kernelFor(t, b.suite), t.TempDir()
	s.opts.Script = fmt.Sprintf("import='%s' run='%s' coarse=%s full=%s\n", b.imports, b.run, yes[b.coarse], yes[b.full]) +
		switchScript
	out, words := runVM(t, s.opts, 30*time.Minute), said{}
	for _, m := range regexp.MustCompile(`(?m)^switch: ([a-z-]+)=(.*)$`).FindAllStringSubmatch(out, -1) {
		words[m[1]] = append(words[m[1]], strings.TrimSpace(m[2]))
	}
	if got, want := words.one(t, "boots"), fmt.Sprint(s.boots); got != want {
		t.Errorf("boot %d: the container has written %q lines, want %s", s.boots, got, want)
	}
	changed := s.images["a"].and(payloads{"0000": "changed\n"})
	if got := words.one(t, "again"); got != changed.sum() {
		t.Errorf("boot %d: the container's payloads are others: %s", s.boots, got)
	}
	var want []string
	for _, name := range strings.Fields(b.run) {
		want = append(want, name+" "+s.images[name].sum())
	}
	if !slices.Equal(words["image"], want) {
		t.Errorf("boot %d: images show %q, want %q", s.boots, words["image"], want)
	}
	if got := words.one(t, "fsck"); got != "clean" {
		t.Errorf("boot %d: fsck: %s", s.boots, got)
	}
	t.Logf("boot %d: %s: %s; packs found %q, left %q; chain images %q", s.boots, b.suite, words.one(t, "mode"),
		words["found"], words["packs"], words["chains"])
	return words
}

// What switch.sh says of blocks.
const (
	dense  = ":9"
	coarse = ":12"
)

// withBlocks returns those of some packs, or chain images, that have these blocks.
func withBlocks(list, blocks string) (found []string) {
	for _, p := range strings.Fields(list) {
		if strings.HasSuffix(p, blocks) {
			found = append(found, p)
		}
	}
	return found
}

// A node's store goes from Linux 6.12 to 6.1 and back, by real reboots, and one of the 6.1 does not mount dense packs:
// containers start with what they had written. Dense packs are copied on that kernel, and packs stay the same on all
// others, where new ones are dense. Chain images are rebuilt where the mode or the packs change.
func TestSwitchKernels(t *testing.T) {
	t.Parallel()
	images := map[string]payloads{"a": small("a", 300), "b": small("b", 300)}
	images["c"] = images["a"].and(small("c", 300))
	s := newSwitcher(t, images)
	steps := []boot{
		{suite: Trixie, imports: "a b", run: "a b", packs: "dense", mode: "shared, file"},
		{suite: BookwormCoarse, run: "a", coarse: true, packs: "coarse", mode: "private, loop"},
		{suite: BookwormCoarse, run: "a b", coarse: true, packs: "same", mode: "private, loop"},
		{suite: Trixie, imports: "c", run: "a b c", packs: "more dense", mode: "shared, file"},
		{suite: Bookworm, run: "a b c", packs: "same", mode: "private, loop"},
		{suite: BookwormCoarse, run: "c", coarse: true, packs: "coarse", mode: "private, loop"},
	}
	var modes []string
	var packs, chains string // after the boot before
	for i, b := range steps {
		words := s.start(t, b)
		found, now, images := words.one(t, "found"), words.one(t, "packs"), words.one(t, "chains")
		if found != packs {
			t.Errorf("boot %d: found packs %q, left %q", i+1, found, packs)
		}
		was, is := withBlocks(found, coarse), withBlocks(now, coarse)
		ok := false
		switch b.packs {
		case "dense":
			ok = len(is) == 0 && len(withBlocks(now, dense)) > 1
		case "same":
			ok = now == found
		case "coarse":
			kept := !slices.ContainsFunc(was, func(p string) bool { return !slices.Contains(is, p) })
			ok = len(withBlocks(now, dense)) == 0 && len(is) > len(was) && kept && len(withBlocks(images, dense)) == 0
		case "more dense":
			ok = slices.Equal(was, is) && len(withBlocks(now, dense)) == 1 && len(withBlocks(images, dense)) == 1
		}
		if !ok {
			t.Errorf("boot %d: packs %q, then %q with chain images %q, want %s", i+1, found, now, images, b.packs)
		}
		stay := b.packs == "same" && b.mode == steps[max(0, i-1)].mode
		for _, c := range strings.Fields(chains) {
			is := slices.Contains(strings.Fields(images), c)
			if stay && !is || b.packs == "coarse" && is != strings.HasSuffix(c, coarse) {
				t.Errorf("boot %d: chain images %q, then %q: %s", i+1, chains, images, c)
			}
		}
		if got := words.one(t, "mode"); got != b.mode {
			t.Errorf("boot %d: mode %q, want %q", i+1, got, b.mode)
		}
		packs, chains = now, images
		modes = append(modes, b.suite+": "+b.mode+", "+b.packs)
	}
	got := "pass"
	if t.Failed() {
		got = "FAIL"
	}
	tell(t, Bookworm, "one disk: "+strings.Join(modes, "; "), got)
}

// A store with dense packs comes to a kernel that does not mount them while the disk has no room for a copy: the
// container's start says so, names the pack and the room, and loses nothing. With room it starts.
func TestSwitchKernelsFull(t *testing.T) {
	t.Parallel()
	large := make([]byte, 32<<20)
	r := rand.NewChaCha8([32]byte{})
	_, _ = r.Read(large)
	s := newSwitcher(t, map[string]payloads{"a": small("a", 100).and(payloads{"large": string(large)})})
	before := s.start(t, boot{suite: Trixie, imports: "a", run: "a"})
	after := s.start(t, boot{suite: BookwormCoarse, run: "a", coarse: true, full: true})
	refused := after.one(t, "refused")
	t.Log("refused: ", refused)
	for _, want := range []string{`the kernel does not mount packs with blocks of 512 bytes`,
		`pack /store/packs/[0-9a-f]{13}\.erofs`, `3[3-9]\d{6} bytes`, `bytes free`} {
		if !regexp.MustCompile(want).MatchString(refused) {
			t.Errorf("the error does not say %q: %s", want, refused)
		}
	}
	left := before.one(t, "packs")
	if found, kept := after.one(t, "found"), after.one(t, "kept"); found != left || kept != left {
		t.Errorf("packs %q, then %q, and %q after the container was refused", left, found, kept)
	}
	if got := after.one(t, "fsck-full"); got != "clean" {
		t.Errorf("fsck while the disk is full: %s", got)
	}
	if now := after.one(t, "packs"); len(withBlocks(left, dense)) == 0 || len(withBlocks(now, dense)) > 0 {
		t.Errorf("packs %q, then %q", left, now)
	}
}
